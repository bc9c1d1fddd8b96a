"""What any driver of the card is put through in a guest: lines for its script, and the host's half.

In the script ``$dev`` is the card's interface, which is up and has the addresses of `tests.guest.Network`.
"""

from __future__ import annotations

from typing import Final

import trio

from tests.guest import Guest, Network, Root
from tests.guest.cards import ServedCard

LINK: Final = """
wait_for 5 grep -q 1 /sys/class/net/$dev/carrier
tell up; await_host
wait_for 5 grep -q 0 /sys/class/net/$dev/carrier
ip link show $dev; tell down; await_host
bring_up $dev
ping -c 1 -W 5 10.77.0.1
"""
"""The link goes down and up with the host's TAP device; see `switch_link`."""


async def switch_link(guest: Guest, card: ServedCard, network: Network, root: Root) -> None:
    """The host's half of `LINK`."""
    await guest.expect("up")
    await network.run(root, "ip", "link", "set", network.tap, "down")
    guest.say()
    await guest.expect("down")
    assert not card.link_is_up
    await network.run(root, "ip", "link", "set", network.tap, "up")
    guest.say()


RECEIVE_MODES: Final = """
tell plain; await_host
ip link set $dev promisc on; tell promisc; await_host
ip link set $dev promisc off allmulticast on; tell allmulti; await_host
ip link set $dev allmulticast off
ip maddr add 01:00:5e:01:02:03 dev $dev; tell group; await_host
ip maddr del 01:00:5e:01:02:03 dev $dev; tell none; await_host
mac=$(cat /sys/class/net/$dev/address)
ip link set $dev address 52:54:00:aa:bb:cc; tell address; await_host
ip link set $dev address $mac
"""
"""Commands to the control queue; see `follow_receive_modes`."""

# Whether a frame passes that is for: the first own address, somebody else, the group, the second own address.
PASSES: Final = {
    "plain": [True, False, False, False],
    "promisc": [True, True, True, True],
    "allmulti": [True, False, True, False],
    "group": [True, False, True, False],
    "none": [True, False, False, False],
    "address": [False, False, False, True],
}


async def follow_receive_modes(guest: Guest, card: ServedCard) -> dict[str, list[bool]]:
    """The host's half of `RECEIVE_MODES`: `PASSES` if each command reached the card."""
    own, other = bytes.fromhex(card.mac.replace(":", "")), bytes.fromhex("525400ffffff")
    changed, group = bytes.fromhex("525400aabbcc"), bytes.fromhex("01005e010203")
    accepts = card.nic.filter.accept
    seen = {}
    for phase, expected in PASSES.items():
        await guest.expect(phase)
        # Linux changes receive modes from a work queue, after the command has returned.
        with trio.move_on_after(5):
            while [accepts(mac) for mac in (own, other, group, changed)] != expected:  # noqa: ASYNC110
                await trio.sleep(0.01)
        seen[phase] = [accepts(mac) for mac in (own, other, group, changed)]
        guest.say()
    return seen


MTU: Final = """
cat /sys/class/net/$dev/mtu
ping -c 1 -M do -s 8972 10.77.0.1
ip link set $dev mtu 1280
if ping -c 1 -W 1 -M do -s 1300 10.77.0.1; then exit 9; fi
ping -c 1 -M do -s 1252 10.77.0.1
ip link set $dev mtu 9000
if ip link set $dev mtu 9001; then exit 9; fi
"""
"""On a port with an MTU of 9000: it is offered, and may be less but not more."""


def mtu_was_taken(output: str) -> bool:
    """Whether this is what `MTU` prints."""
    return "9000\n" in output and output.count("1 received, 0% packet loss") == 2
