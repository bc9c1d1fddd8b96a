"""Cards that leave a running guest, and cards with too few MSI-X vectors.

QEMU aborts when it has to let go of a card with MSI-X (`tests.guest.test_lifecycle` has a test of that), and
without MSI-X neither parent can start a vDPA device: what is pulled out from under them has not been started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from device.profiles import parse_profile
from device.virtio.transport import Status
from tests.guest import Card, Network
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.vdpa.conftest import BootVdpa
from tests.guest.vdpa.parents import ADD, ADDRESSES, DELETE, IFCVF, VP_VDPA, Parent

# What each says when it does not get its vectors; vp_vdpa with a trace, from its vp_vdpa_set_status.
TOO_FEW: Final = {
    IFCVF: ["Failed to alloc IRQ vectors", "failed to request irq with error -14"],
    VP_VDPA: ["vp_vdpa: fail to allocate irq vectors want 3 but", "vp_vdpa_set_status"],
}

# The interface stays down: brought up, it would wait for ever for an answer of the control queue.
ADDED: Final = f"""
modprobe virtio_vdpa
modprobe virtio_net
{{take}}
{ADD}
tell added; await_host
"""


def script(parent: Parent, rest: str) -> str:
    return ADDED.format(take=parent.take()) + rest


def started(card: ServedCard) -> bool:
    return bool(card.nic.card.transport.status & Status.DRIVER_OK)


def on(network: Network) -> list[str]:
    return [f"tap:name={network.tap},netns={network.path}"]


async def test_a_card_is_pulled_out_from_under_its_parent_and_plugged_in_again(
    parent: Parent, boot_vdpa: BootVdpa, network: Network, tmp_path: Path
) -> None:
    rest = f"""
    tell unplug; await_host
    wait_for 10 test ! -e /sys/bus/pci/devices/${{mgmt#pci/}}
    vdpa mgmtdev show
    vdpa dev show
    tell plug; await_host
    {ADDRESSES}
    ping -c 1 -W 5 10.77.0.1
    """
    async with (
        serve_cards(tmp_path, on(network), msix=False) as (card,),
        boot_vdpa(
            script(parent, rest),
            [Card(card.socket, root_port=True)],
            expected_complaints=TOO_FEW[parent],
        ) as guest,
    ):
        await guest.expect("added")
        assert not started(card)
        guest.say()
        await guest.expect("unplug")
        await guest.qmp("device_del", id="card0")
        await guest.qmp_event("DEVICE_DELETED", device="card0")
        guest.say()
        await guest.expect("plug")
        assert "pci/" not in guest.output
        socket = {"type": "unix", "path": str(card.socket)}
        await guest.qmp("device_add", driver="vfio-user-pci", id="card0", bus="card0-port", socket=socket)
        guest.say()
        result = await guest.wait()
        assert " 0% packet loss" in result.output


async def test_vp_vdpa_starts_nothing_with_two_vectors_and_ifcvf_gets_the_card_working(
    boot_vdpa: BootVdpa, network: Network, tmp_path: Path
) -> None:
    rest = f"""
    {DELETE}
    {IFCVF.up()}
    ping -c 1 -W 5 10.77.0.1
    """
    profile = parse_profile("n3000:vectors=shared")
    async with (
        serve_cards(tmp_path, on(network), profile=profile) as (card,),
        boot_vdpa(script(VP_VDPA, rest), [card.socket], expected_complaints=TOO_FEW[VP_VDPA]) as guest,
    ):
        await guest.expect("added")
        assert not started(card)
        guest.say()
        result = await guest.wait()
        assert started(card)
        assert " 0% packet loss" in result.output
