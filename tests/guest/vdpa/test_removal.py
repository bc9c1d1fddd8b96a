"""Cards that leave a running guest, and a card with too few MSI-X vectors for vp_vdpa.

QEMU aborts when it has to let go of a card with MSI-X (`tests.guest.test_lifecycle` has a test of that), and
without MSI-X neither parent can start a vDPA device: what is pulled out from under them has not been started.
"""

from __future__ import annotations

import re
from typing import Final

import pytest
import trio

from device.profiles import parse_profile
from device.virtio.transport import Status
from tests.guest import Card, Guest, Network, Root
from tests.guest.cards import ServedCard, serve_cards
from tests.guest.conftest import networks
from tests.guest.vdpa.parents import IFCVF, PARENTS, VP_VDPA
from tests.guest.vdpa.story import Story

TOO_FEW: Final = (
    *("Failed to alloc IRQ vectors", "failed to request irq with error -14"),
    *("vp_vdpa: fail to allocate irq vectors want 3 but", "vp_vdpa_set_status"),
)
"""What each parent says when it does not get its vectors; vp_vdpa with a trace, of vp_vdpa_set_status."""

TWO_VECTORS: Final = len(PARENTS)
"""The number of the card that stays; those before it are pulled out from under the parent of their number."""

# A vDPA device on each card. Interfaces stay down: brought up, they would wait for ever for an answer of the
# control queue.
SCRIPT: Final = (
    "modprobe virtio_vdpa; modprobe virtio_net; has_interface() { test -e $1/virtio*/net; }\n"
    + "".join(
        f"""
{parent.take(number)}
vdpa dev add name vdpa{number} mgmtdev $mgmt
"""
        for number, parent in enumerate([*PARENTS, VP_VDPA])
    )
    + f"""
functions="$(for n in {" ".join(map(str, range(TWO_VECTORS)))}; do card $n; done)"
tell added; await_host
step gone
tell unplug; await_host
for function in $functions; do wait_for 10 test ! -e $function; done
vdpa dev show
step back
tell plug; await_host
for function in $functions; do wait_for 10 has_interface $function; done
vdpa dev del vdpa{TWO_VECTORS}
{IFCVF.take(TWO_VECTORS)}
vdpa dev add name vdpa0 mgmtdev $mgmt
for n in {" ".join(map(str, range(TWO_VECTORS + 1)))}; do
    dev=$(basename $(card $n)/virtio*/net/*)
    ip addr add 10.77.$n.2/24 dev $dev
    bring_up $dev
    ping -c 1 -W 5 10.77.$n.1
done
step end
"""
)


async def _plug(guest: Guest, cards: list[ServedCard]) -> None:
    for number, card in enumerate(cards):
        socket = {"type": "unix", "path": str(card.socket)}
        name = f"card{number}"
        await guest.qmp("device_add", driver="vfio-user-pci", id=name, bus=f"{name}-port", socket=socket)


async def _unplug(guest: Guest, cards: list[ServedCard]) -> None:
    for number, _ in enumerate(cards):
        await guest.qmp("device_del", id=f"card{number}")
        await guest.qmp_event("DEVICE_DELETED", device=f"card{number}")


def statuses(cards: list[ServedCard]) -> list[Status]:
    """What each card's driver has made of it."""
    return [card.nic.card.transport.status for card in cards]


async def _watch(root: Root, links: list[Network], folders: pytest.TempPathFactory) -> Story:
    story = Story()
    *leaving, staying = [f"tap:name={link.tap},netns={link.path}" for link in links]
    two_vectors = [parse_profile("n3000:vectors=shared")]
    async with (
        serve_cards(folders.mktemp("leaving"), leaving, msix=False) as gone,
        serve_cards(folders.mktemp("staying"), [staying], profiles=two_vectors) as stays,
    ):
        cards = [*gone, *stays]
        slots = [Card(card.socket, root_port=True) for card in cards]
        async with story.told(SCRIPT, slots, root, expected_complaints=TOO_FEW) as guest:
            await guest.expect("added")
            story.seen["added"] = statuses(cards)
            guest.say()
            await guest.expect("unplug")
            await _unplug(guest, gone)
            guest.say()
            await guest.expect("plug")
            await _plug(guest, gone)
            guest.say()
            result = await guest.wait()
            story.seen["unsaid"] = [words for words in TOO_FEW if words not in result.console]
            story.seen["end"] = statuses(stays)
    return story


@pytest.fixture(scope="module")
def story(guest_root: Root, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The script, run to its end in a guest with a card for each parent and one with two vectors."""
    with networks() as make:
        links = [make(tap=f"tap{number}", subnet=f"10.77.{number}") for number in range(TWO_VECTORS + 1)]
        return trio.run(_watch, guest_root, links, tmp_path_factory)


def test_the_script_comes_to_its_end_and_the_kernel_tells_of_missing_vectors_alone(story: Story) -> None:
    assert story.step("end") == ""
    assert story.complaints == story.seen["unsaid"] == []


def test_nobody_starts_a_card_with_too_few_vectors(story: Story) -> None:
    assert not any(status & Status.DRIVER_OK for status in story.seen["added"])


def test_a_card_is_pulled_out_from_under_its_parent_and_its_vdpa_device_goes_with_it(story: Story) -> None:
    assert re.findall(r"^(vdpa\d):", story.step("gone"), re.MULTILINE) == [f"vdpa{TWO_VECTORS}"]


def test_cards_that_are_plugged_in_again_work(story: Story) -> None:
    said = story.step("back")
    for card in range(TWO_VECTORS):
        assert f"10.77.{card}.1 ping statistics ---\n1 packets transmitted, 1 received" in said


def test_ifcvf_gets_a_card_working_that_has_too_few_vectors_for_vp_vdpa(story: Story) -> None:
    said = story.step("back")
    assert f"10.77.{TWO_VECTORS}.1 ping statistics ---\n1 packets transmitted, 1 received" in said
    assert [bool(status & Status.DRIVER_OK) for status in story.seen["end"]] == [True]
