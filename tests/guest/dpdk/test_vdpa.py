"""DPDK's driver of the IFC VF (drivers/vdpa/ifc) in a guest's user space, on vfio-pci behind a virtual IOMMU:
it gives the card to a vhost-user frontend. That is a program of ours, and then DPDK's own virtio-user driver.

The guest runs once for all sentences here. The cards are served by our own engine alone: libvfio-user refuses
the unmaps of such a QEMU (Limit.UNKNOWN_UNMAPS).
"""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest
import trio

from device.profiles import parse_profile
from tests.guest import Guest, Root, boot
from tests.guest._dpdk import loading
from tests.guest.cards import MAC, ServedCard, serve_cards
from tests.guest.dpdk.testpmd import PREPARED, STEERED, Testpmd
from tests.guest.dpdk.wire import Wire
from tests.guest.programs import Step, program, read_steps
from tests.guest.seen import kept_warnings
from tests.guest.vdpa.kernel_log import KERNEL_ARGS, complaints

DRIVEN: Final = ["n3000", "c5000x"]
HIDDEN: Final = "n3000:lm=hidden"
SHARED: Final = "n3000:vectors=shared"
PLAIN: Final = "virtio"
CARDS: Final = [*DRIVEN, HIDDEN, SHARED, PLAIN]
PARTS: Final = ["frames", "state", "queues", "log", "vanish", "frames"]
ROUNDS: Final = 12  # of the part "state"
ADDRESS: Final = MAC % 0  # each card's
PATIENCE: Final = 240  # seconds for some fifteen on an idle machine

TESTPMD: Final = (
    f"dpdk-testpmd --in-memory --single-file-segments -m 64 -l 0-1 --no-pci"
    f" {loading('bus_vdev', 'mempool_ring', 'net_virtio')}"
    f" --vdev=net_virtio_user0,path=/tmp/vdpa.sock,queues=1,mac={ADDRESS} -- -i --total-num-mbufs=2048"
)

SCRIPT: Final = f"""
{PREPARED.format(pages=64)}
install -m 755 /run/files/vhost_frontend /bin/vhost_frontend

backend() {{  # CARD [KEY=VALUE]: have DPDK's driver take a card, and serve it
    rm -f /tmp/vdpa.sock
    [ -e /tmp/end ] || mkfifo /tmp/end
    vdpa_backend --in-memory -m 32 -l 0 {loading("bus_pci", "mempool_ring", "vdpa_ifc")} \\
        -a $1,vdpa=1${{2:+,$2}} -- $1 /tmp/vdpa.sock < /tmp/end > /tmp/backend 2>&1 &
    exec 5> /tmp/end
    wait_for 30 grep -qxE 'ready|no vDPA device .*' /tmp/backend
}}

no_backend() {{
    exec 5>&-
    wait $! || true
    cat /tmp/backend
}}

has_left() {{ [ $(grep -c '^left' /tmp/backend) -gt $1 ]; }}

frontend() {{  # PART
    echo "part $1"
    left=$(grep -c '^left' /tmp/backend) || true
    vhost_frontend $1 /tmp/vdpa.sock {ADDRESS}
    wait_for 30 has_left $left
    tell left; await_host
}}

functions="$(for n in 0 1 2 3 4; do card $n; done)"
give vfio-pci $functions
set -- $(for f in $functions; do echo ${{f##*/}}; done)
for n in 0 1; do
    echo "card $n"
    backend $1
    for part in {" ".join(PARTS)}; do frontend $part; done
    no_backend
    shift
done
echo "card hidden"
backend $1
no_backend
echo "card software"
backend $1 sw-live-migration=1
frontend frames
tell testpmd
{STEERED.format(command=TESTPMD)}
no_backend
echo "card shared"
backend $2
vhost_frontend vanish /tmp/vdpa.sock {ADDRESS}
wait_for 30 grep -q 'vhost peer closed' /tmp/backend
no_backend
echo "card plain"
backend $3
no_backend
tell quiet; await_host
"""


@dataclass(frozen=True, slots=True)
class Stop:
    """How things were while the device was stopped: what the driver told, and what the card had counted."""

    received: int
    sent: int
    counted_received: int
    counted_sent: int
    windows: int


@dataclass
class Story:
    """What was seen."""

    stops: list[list[Stop]] = field(default_factory=lambda: [[], []])
    """Those of the part "state", of each driven card."""
    left: list[int] = field(default_factory=list)
    """Windows of the card each time that a frontend had gone."""
    returned: list[bool] = field(default_factory=list)
    """Whether testpmd sent frames back, before and after its port was stopped."""
    windows: list[int] = field(default_factory=list)
    """Of each card, at the end."""
    warnings: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    output: str = ""

    def said(self, card: str) -> str:
        """What the programs said of a card: 0, 1, hidden, software, shared, plain."""
        found = re.search(rf"^card {card}$(.*?)(?=^card |\Z)", self.output, re.MULTILINE | re.DOTALL)
        assert found, f"the script did not come to {card}: {self.output[-2000:]}"
        return found[1]

    def steps(self, card: str, part: str) -> list[Step]:
        """Those of a program's part."""
        _, *parts = re.split(r"^part (\w+)$", self.said(card), flags=re.MULTILINE)
        return read_steps(dict(zip(parts[::2], parts[1::2], strict=True))[part])


async def _see_part(story: Story, guest: Guest, number: int, card: ServedCard, part: str) -> None:
    """What the program of ours shows."""
    shown = {
        "frames": ["by_eventfd", "by_doorbell"],
        "state": ["stopped"] * ROUNDS,
        "queues": ["receive_off", "transmit_off"],
        "log": ["logging", "logged"],
        "vanish": [],
    }[part]
    before = card.counters
    for name in shown:
        detail = await guest.expect(name)
        if name == "stopped":
            received, sent = map(int, detail.split())
            counted = [card.counters[key] - before[key] for key in ("rx_frames", "tx_frames")]
            windows = len(card.nic.function.dma.windows())
            story.stops[number].append(Stop(received, sent, counted[0], counted[1], windows))
        guest.say()


async def _see_card(story: Story, guest: Guest, number: int, card: ServedCard, wire: Wire) -> None:
    """All parts with a card, whose peer is a mirror; frames of who vanishes come back to nobody."""
    for part in PARTS if number < len(DRIVEN) else ["frames"]:
        async with trio.open_nursery() as nursery:
            if part != "vanish":
                nursery.start_soon(wire.send_back)
            await _see_part(story, guest, number, card, part)
            await guest.expect("left")
            nursery.cancel_scope.cancel()
        story.left.append(len(card.nic.function.dma.windows()))
        wire.forget()
        guest.say()


async def _see_testpmd(story: Story, guest: Guest, wire: Wire) -> None:
    """DPDK's own frontend: frames of the host's come back with their addresses swapped."""
    await guest.expect("testpmd")
    own, ours = bytes.fromhex(ADDRESS.replace(":", "")), b"\2\0\0\0\0\1"
    pmd = Testpmd(guest)
    await pmd.started()
    await pmd.run("set fwd macswap retry")
    for order in ("start", "stop"):
        await pmd.run("start")
        for size in (60, 500, 1514):
            rest = b"\x88\xb5" + bytes(n & 0xFF for n in range(size - 14))
            await wire.send(own + ours + rest)
            story.returned.append(await wire.receive() == ours + own + rest)
        await pmd.run("stop")
        if order == "start":
            await pmd.run("port stop 0")
            await pmd.run("port start 0")
    await pmd.quit()


async def _watch(root: Root, dpdk: Path, folder: Path) -> Story:
    story = Story()
    async with AsyncExitStack() as stack:
        wires: list[Wire] = []
        cards: list[ServedCard] = []
        for number, name in enumerate(CARDS):
            place = folder / f"{number}"
            place.mkdir()
            wire = Wire(place / "wire")
            served = serve_cards(place, [wire.port], profile=parse_profile(name))
            cards += await stack.enter_async_context(served)
            wires.append(await stack.enter_async_context(wire))
        guest = await stack.enter_async_context(
            boot(
                SCRIPT,
                [card.socket for card in cards],
                root=root,
                smp=2,
                memory="1G",
                kernel_args=KERNEL_ARGS,
                iommu=True,
                files={"vhost_frontend": program("vhost_frontend")},
                trees=[dpdk],
                deadline=PATIENCE,
            )
        )
        with kept_warnings(story.warnings):
            for number in range(3):
                await _see_card(story, guest, number, cards[number], wires[number])
            await _see_testpmd(story, guest, wires[2])
            await guest.expect("quiet")
            story.windows = [len(card.nic.function.dma.windows()) for card in cards]
            guest.say()
            result = await guest.wait()
        story.output = result.output
        story.complaints = complaints(result.console)
    return story


@pytest.fixture(scope="module")
def story(guest_root: Root, dpdk: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """The backend and its frontends, run to their end in a guest."""
    return trio.run(_watch, guest_root, dpdk, tmp_path_factory.mktemp("vdpa"))


def good(steps: list[Step], *names: str) -> None:
    """AssertionError unless these steps and no others were made, and went well."""
    assert [step for step in steps if not step.good] == []
    assert [step.name for step in steps] == ["status", *names]


@pytest.mark.parametrize("card", range(len(DRIVEN)), ids=DRIVEN)
def test_frames_pass_by_eventfds_and_by_doorbells_that_the_frontend_maps(story: Story, card: int) -> None:
    good(story.steps(f"{card}", "frames"), "by_eventfd", "by_doorbell", "frames")


@pytest.mark.parametrize("card", range(len(DRIVEN)), ids=DRIVEN)
def test_the_device_stops_in_traffic_and_no_frame_is_lost_or_comes_twice(story: Story, card: int) -> None:
    good(
        story.steps(f"{card}", "state"),
        *("rounds", "bases_are_what_the_rings_show", "under_way_at_stops", "indices_went_round", "state"),
    )


@pytest.mark.parametrize("card", range(len(DRIVEN)), ids=DRIVEN)
def test_ring_state_at_stops_is_what_the_card_has_counted(story: Story, card: int) -> None:
    stops = story.stops[card]
    assert len(stops) == ROUNDS
    assert [(stop.received, stop.sent) for stop in stops] == [
        (stop.counted_received, stop.counted_sent) for stop in stops
    ]
    assert {stop.windows for stop in stops} == {0}


@pytest.mark.parametrize("card", range(len(DRIVEN)), ids=DRIVEN)
def test_one_queue_is_off_and_on_again_while_the_other_goes_on(story: Story, card: int) -> None:
    parts = ("receive_off", "receive_on", "transmit_off", "transmit_on", "queues")
    good(story.steps(f"{card}", "queues"), *parts)


@pytest.mark.parametrize("card", range(len(DRIVEN)), ids=DRIVEN)
def test_the_pages_that_are_logged_are_exactly_those_that_were_written(story: Story, card: int) -> None:
    parts = ("before_the_log", "while_logging", "logged", "after_the_log", "not_logged", "log")
    good(story.steps(f"{card}", "log"), *parts)


def test_frontends_that_go_leave_nothing_mapped_even_in_traffic(story: Story) -> None:
    assert story.left == [0] * (2 * len(PARTS) + 1)
    assert story.windows == [0] * len(CARDS)


def test_dpdks_own_frontend_forwards_before_and_after_a_stop(story: Story) -> None:
    assert story.returned == [True] * 6


def test_without_the_block_the_driver_takes_a_card_only_to_log_by_itself(story: Story) -> None:
    assert "does not support HW assist live migration, please enable sw-live-migration" in story.said(
        "hidden"
    )
    good(story.steps("software", "frames"), "by_eventfd", "by_doorbell", "frames")


def test_the_driver_demands_a_vector_for_each_queue(story: Story) -> None:
    """It asks vfio-pci for one for each of two queues and one for configuration."""
    assert "Error enabling MSI-X interrupts: Invalid argument" in story.said("shared")


def test_the_driver_does_not_take_a_plain_nic(story: Story) -> None:
    assert "no vDPA device" in story.said("plain")


def test_dpdk_offers_no_link_status(story: Story) -> None:
    """Its library leaves VIRTIO_NET_F_STATUS out (lib/vhost), so no frontend is told of the link."""
    assert {step.detail for step in story.steps("0", "frames") if step.name == "status"} == {"not offered"}


def test_nobody_complains(story: Story) -> None:
    assert story.warnings == []
    assert story.complaints == []
