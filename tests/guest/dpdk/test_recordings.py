"""What drivers in user space do to the card's registers: a program that has it by vhost-vdpa, and DPDK's two.

The guest has a virtual IOMMU. The card is served by our own engine alone: libvfio-user refuses the unmaps of
such a QEMU (Limit.UNKNOWN_UNMAPS).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from tests.guest import Guest, Root
from tests.guest._dpdk import loading
from tests.guest.cards import serve_cards
from tests.guest.dpdk.testpmd import PREPARED
from tests.guest.programs import program
from tests.guest.recording import Recordings, check
from tests.guest.vdpa.parents import ADD, IFCVF, VDPA
from tests.guest.vdpa.story import Story
from tests.guest.vdpa.vhost import SHOWN

PROFILE: Final = "n3000"

KEPT_STOPS: Final = 3
"""Of the program's part `state`, which stops queues in traffic, and goes on. The others are like these."""

PATIENCE: Final = 180  # seconds for some ten on an idle machine

SCRIPT: Final = f"""
modprobe vhost_vdpa
install -m 755 /run/files/vhost_vdpa /bin/vhost_vdpa
tell begin; await_host
{IFCVF.take()}
{ADD}
wait_for 10 test -e /dev/vhost-vdpa-0
vhost_vdpa state /dev/vhost-vdpa-0
vdpa dev del {VDPA}
{PREPARED.format(pages=128)}
f=$(card)
give vfio-pci $f
f=${{f##*/}}
printf '%s\\n' 'start tx_first' stop quit > /tmp/commands
memory="--in-memory --single-file-segments -m 64 {loading("mempool_ring")}"
testpmd() {{
    dpdk-testpmd $memory -l 0-1 {loading("net_virtio")} "$@" \\
        -- -i --total-num-mbufs=2048 --cmdline-file=/tmp/commands < /dev/null
}}
tell begin; await_host
# testpmd on a vhost-user socket, whose other end has the card by DPDK's vDPA driver
mkfifo /tmp/backend
vdpa_backend --in-memory -m 32 -l 0 {loading("vdpa_ifc", "mempool_ring", "bus_pci")} -a $f,vdpa=1 \\
    -- $f /tmp/vdpa.sock < /tmp/backend &
exec 5> /tmp/backend
wait_for 20 test -S /tmp/vdpa.sock
testpmd {loading("bus_vdev")} --no-pci --vdev=net_virtio_user0,path=/tmp/vdpa.sock,queues=1
exec 5>&-
wait
tell end; await_host
testpmd {loading("bus_pci")} -a $f
tell end; await_host
"""


@asynccontextmanager
async def _echo(path: Path) -> AsyncIterator[str]:
    """A port whose peer sends everything back, also what comes while nothing is received."""

    async def send_back(stream: trio.SocketStream) -> None:
        async for part in stream:
            await stream.send_all(part)

    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, send_back, [trio.SocketListener(listener)])
            yield f"stream:path={path}"
            nursery.cancel_scope.cancel()


async def _record(guest: Guest, recordings: Recordings) -> dict[str, list[str]]:
    """Each driver's doings, by the name of its recording."""
    lives: dict[str, list[str]] = {}

    async def begun() -> None:
        await guest.expect("begin")
        recordings.take(0)
        guest.say()

    await begun()
    for number, name in enumerate(SHOWN["state"]):
        await guest.expect(name)
        if number == KEPT_STOPS:
            lives["ifcvf-vhost"] = recordings.take(0)
        guest.say()
    await begun()
    for name in ("dpdk-ifc", "dpdk-virtio"):
        await guest.expect("end")
        lives[name] = recordings.take(0)
        guest.say()
    return lives


async def test_drivers_in_user_space_do_to_the_card_what_was_recorded(
    guest_root: Root, dpdk: Path, tmp_path: Path
) -> None:
    story = Story()
    async with (
        _echo(tmp_path / "echo") as port,
        serve_cards(tmp_path, [port]) as cards,
        story.told(
            SCRIPT,
            cards,
            guest_root,
            iommu=True,
            smp=2,
            memory="1G",
            trees=[dpdk],
            files={"vhost_vdpa": program("vhost_vdpa")},
            deadline=PATIENCE,
        ) as guest,
    ):
        lives = await _record(guest, Recordings(cards))
    assert story.complaints == []
    for name, lines in lives.items():
        check(name, [f"# {PROFILE}", *lines])
