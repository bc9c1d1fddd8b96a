"""Guests that run DPDK, and testpmd in them as its user has it: an order, and what it answers."""

from __future__ import annotations

import re
from typing import Final

from tests.guest import Guest

PREPARED: Final = """
chmod 755 /  # else DPDK loads no drivers: anybody could have put them there
echo {pages} > /proc/sys/vm/nr_hugepages
mkdir /dev/hugepages
mount -t hugetlbfs pages /dev/hugepages
modprobe vfio-pci
modprobe vfio_iommu_type1
"""
"""For scripts: has so many huge pages of 2 MiB, and what gives cards to programs."""

STEERED: Final = """
mkfifo /tmp/orders
{command} < /tmp/orders &
exec 3> /tmp/orders
while order=$(await_host); [ "$order" ]; do echo "$order" >&3; done
exec 3>&-
wait $!
"""
"""For scripts: has a command that the host steers; an empty line ends it."""

_PROMPT = "testpmd> "


class Testpmd:
    """A testpmd that runs in `STEERED`."""

    __test__ = False

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    async def started(self) -> str:
        """Wait until it takes orders; what it said before."""
        return await self._guest.printed(_PROMPT)

    async def run(self, order: str) -> str:
        """What it answers to an order."""
        self._guest.say(order)
        _, _, answer = (await self._guest.printed(_PROMPT)).partition("\n")
        return answer

    async def heard(self, words: str) -> None:
        """Wait until it says this by itself."""
        await self._guest.printed(words)

    async def quit(self) -> None:
        """Have it end, and the script go on."""
        self._guest.say("quit")
        await self._guest.printed("Bye...")
        self._guest.say("")


def shown(text: str, title: str) -> str:
    """The value that testpmd shows as ``title: value``."""
    found = re.search(rf"^\s*{re.escape(title)}:[ \t]*(.*?)\s*$", text, re.MULTILINE)
    assert found, f"no {title!r} in: {text}"
    return found[1]
