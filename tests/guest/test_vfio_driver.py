"""A driver in user space in a guest with a virtual IOMMU: the guest's own vfio-pci has the cards, its own
type1 IOMMU maps memory and BARs for DMA, and QEMU passes all of that on to the card's server.

The program runs once for all sentences here, with either kind of revocation. The cards are served by our own
engine alone: libvfio-user refuses the unmaps of such a QEMU, and has too few windows for it
(Limit.UNKNOWN_UNMAPS, Limit.DMA_WINDOWS).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from device.revocation import Revocation
from tests.guest import Root, boot
from tests.guest.cards import serve_cards
from tests.guest.programs import Step, program, read_steps
from tests.guest.seen import Span, Windows, kept_warnings, span

SCRIPT = """
modprobe vfio-pci
modprobe vfio_iommu_type1
install -m 755 /run/files/vfio_driver /bin/vfio_driver
a=$(card 0) b=$(card 1)
give vfio-pci $a $b
a=${a##*/} b=${b##*/}
vfio_driver bars $a
vfio_driver interrupts $a
vfio_driver frames $a
vfio_driver peers $a $b
vfio_driver lines $a $b
vfio_driver churn $a
tell quiet; await_host
vfio_driver registers $a
tell registers; await_host
vfio_driver storm $a $b
tell storm; await_host
"""

PAGE, HUGE_PAGE = 4096, 2 << 20
OWN, BAR = 0x1_0000_0000, 0x2_0000_0000
OWN_SIZE = 4 << 20
BAR_SIZE = 16 << 20
BULK = 64 << 20
PATIENCE = 120  # seconds for some twelve on an idle machine

# When the program shows the host how things are, in its order.
SHOWN = [
    "map_memory",
    "map_full_bar",
    "map_partial_bar",
    "map_bar_misaligned",
    "map_peers_bar",
    "bulk",
    "quiet",
    "registers",
    "storm",
]

RX, TX = 0, 1
NOWHERE = "a buffer is not in a DMA window that allows the access"


@dataclass(frozen=True, slots=True)
class Moment:
    """How things were when the program showed them."""

    windows: list[Windows]
    """Each card's."""
    said: str
    """What QEMU had printed to its stderr."""
    warnings: list[str]
    """What the cards had logged."""


@dataclass
class Story:
    """What was seen of the program."""

    steps: dict[str, Step] = field(default_factory=dict)
    moments: dict[str, Moment] = field(default_factory=dict)
    """Those of `SHOWN`."""
    status: int | None = None

    def good(self, *names: str) -> None:
        """AssertionError unless all these steps were made and went well."""
        assert [name for name in names if name not in self.steps] == []
        assert [self.steps[name] for name in names if not self.steps[name].good] == []

    def said_between(self, first: str, last: str) -> list[str]:
        """What QEMU printed from one moment to another."""
        return self.moments[last].said.removeprefix(self.moments[first].said).splitlines()


async def _watch(root: Root, revocation: Revocation, folder: Path) -> Story:
    story = Story()
    warnings: list[str] = []
    async with (
        serve_cards(folder, ["loopback", "loopback"], revocation=revocation) as cards,
        boot(
            SCRIPT,
            [card.socket for card in cards],
            root=root,
            iommu=True,
            files={"vfio_driver": program("vfio_driver")},
            deadline=PATIENCE,
        ) as guest,
    ):
        with kept_warnings(warnings):
            for name in SHOWN:
                await guest.expect(name)
                windows = [sorted(card.nic.function.dma.windows()) for card in cards]
                story.moments[name] = Moment(windows, guest.qemu_stderr, warnings.copy())
                guest.say()
            result = await guest.wait(check=False, clean_stderr=False)
    story.status = result.status
    story.steps = {step.name: step for step in read_steps(result.output)}
    return story


@pytest.fixture(scope="module", params=list(Revocation), ids=lambda way: way.value)
def story(
    guest_root: Root, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Story:
    """The program, run to its end in a guest with two cards."""
    return trio.run(_watch, guest_root, request.param, tmp_path_factory.mktemp("vfio_driver"))


def test_the_program_comes_to_its_end_and_qemu_has_nothing_to_say(story: Story) -> None:
    parts = ("bars", "interrupts", "frames", "peers", "lines", "churn", "registers", "storm")
    story.good(*(f"{part}_end" for part in parts))
    assert [step for step in story.steps.values() if not step.good] == []
    assert story.status == 0
    assert story.moments["quiet"].said == ""


def test_memory_that_is_mapped_for_dma_reaches_the_card_with_its_descriptor(story: Story) -> None:
    story.good("map_memory")
    mapped, other = story.moments["map_memory"].windows
    assert span(mapped).start == OWN
    assert span(mapped).size == OWN_SIZE
    assert span(mapped).has_descriptor
    assert other == []


def test_what_is_mapped_already_and_a_part_of_it_are_refused(story: Story) -> None:
    story.good("map_memory_twice", "unmap_a_part")
    assert [story.steps[name].detail for name in ("map_memory_twice", "unmap_a_part")] == ["EEXIST", "EINVAL"]


def test_a_whole_bar_is_mapped_for_dma_in_huge_pages(story: Story) -> None:
    """QEMU has no descriptor to give for a BAR that it has mapped itself: the card will have to ask it."""
    story.good("map_full_bar")
    assert span(story.moments["map_full_bar"].windows[0]) == Span(BAR, BAR_SIZE, HUGE_PAGE, False)


def test_a_part_of_a_bar_is_mapped_for_dma(story: Story) -> None:
    story.good("map_partial_bar")
    assert span(story.moments["map_partial_bar"].windows[0]) == Span(BAR, BAR_SIZE // 2, HUGE_PAGE, False)


def test_a_bar_that_lies_askew_of_huge_pages_is_mapped_in_small_ones(story: Story) -> None:
    story.good("map_bar_misaligned")
    mapped = span(story.moments["map_bar_misaligned"].windows[0])
    assert mapped == Span(BAR + 2 * PAGE, BAR_SIZE // 2, PAGE, False)


def test_a_bar_without_memory_decoding_cannot_be_faulted_in(story: Story) -> None:
    story.good("map_bar_without_memory")
    assert story.steps["map_bar_without_memory"].detail == "EFAULT"


@pytest.mark.parametrize(
    ("away", "back"),
    [("memory_off", "memory_on"), ("memory_off_again", "memory_on_again"), ("asleep", "awake")],
    ids=["memory off", "memory off again", "D3hot"],
)
def test_a_device_that_does_not_answer_is_a_bus_error_and_keeps_its_bytes(
    story: Story, away: str, back: str
) -> None:
    story.good(away, back)
    assert story.steps[away].detail == "SIGBUS"


def test_a_reset_clears_the_bar_which_can_be_used_at_once(story: Story) -> None:
    story.good("device_reset", "bar_after_reset", "bar_used_after_reset", "unmap_bar")


@pytest.mark.parametrize(
    ("kind", "vectors"), [("msix", 4), ("msi", 1), ("intx", 1), ("msix_again", 4)], ids=lambda word: str(word)
)
def test_each_kind_of_interrupt_arrives_by_eventfd(story: Story, kind: str, vectors: int) -> None:
    story.good(f"{kind}_by_hand", f"{kind}_signal_0", f"{kind}_signal_1", f"{kind}_no_more")
    assert story.steps[f"{kind}_by_hand"].detail == f"{vectors} of {vectors}"


@pytest.mark.parametrize("payload", [0, 1, 46, 1000, 1500])
def test_frames_go_out_and_come_back_by_a_driver_in_user_space(story: Story, payload: int) -> None:
    story.good(f"frame_{payload}")


def test_the_driver_starts_again_after_a_reset_and_does_not_have_to_when_memory_was_off(story: Story) -> None:
    story.good("frame_after_reset_0", "frame_after_reset_1", "frame_after_memory_was_off")


def test_a_peers_bar_is_mapped_in_the_clients_of_both_cards(story: Story) -> None:
    for windows in story.moments["map_peers_bar"].windows:
        own = [window for window in windows if window[0] < BAR]
        assert span(own).has_descriptor
        assert span(windows[len(own) :]) == Span(BAR, BAR_SIZE, HUGE_PAGE, False)


@pytest.mark.parametrize(
    "step",
    ["sent_from_the_bar", "received_in_the_bar", "from_bar_to_bar", "rings_and_buffers_in_the_bar"],
    ids=lambda step: step.replace("_", " "),
)
def test_a_card_moves_frames_through_its_peers_bar(story: Story, step: str) -> None:
    story.good(step)


def test_a_peer_that_answers_nobody_fails_the_driver_until_a_reset(story: Story) -> None:
    story.good("peer_is_away", "own_memory_meanwhile")
    story.good("sent_from_an_absent_bar", "received_in_an_absent_bar", "own_memory_after_the_reset")
    story.good("peer_is_back")


def test_a_bar_that_was_unmapped_is_out_of_reach(story: Story) -> None:
    story.good("unmap_peers_bar", "sent_from_an_unmapped_bar", "own_memory_afterwards")


def test_a_cards_own_bar_is_as_good_as_a_peers_also_while_qemu_maps_none_because_of_intx(
    story: Story,
) -> None:
    """Asked for such memory, QEMU asks the same card in turn for its BAR."""
    story.good("own_bar", "own_memory_by_line", "line", "own_bar_by_line", "peers_bar_by_line")


def test_registers_are_mapped_by_the_kernel_but_not_by_qemu(story: Story) -> None:
    story.good("map_registers", "sent_from_registers", "own_memory_after_registers")
    said = story.said_between("quiet", "registers")
    assert said
    assert [line for line in said if "iommu map to non memory area" not in line] == []


def test_ten_thousands_of_mappings_come_and_go_and_the_card_works_on(story: Story) -> None:
    story.good("pairs", "bulk", "strays", "frame_after_all", "unmap_all", "attached_again")
    bulk = [window for window in story.moments["bulk"].windows[0] if window[0] >= BAR]
    assert span(bulk) == Span(BAR, BULK, PAGE, True)


def test_a_driver_that_has_gone_leaves_nothing_mapped(story: Story) -> None:
    assert story.moments["quiet"].windows == [[], []]


def test_cards_complain_of_nothing_but_the_buffers_that_were_taken_from_them(story: Story) -> None:
    lost = [message.partition(": ")[2] for message in story.moments["registers"].warnings]
    assert lost == [f"queue {queue} is broken: {NOWHERE}" for queue in (TX, RX, TX, TX)]


def test_memory_may_be_taken_away_at_any_moment_of_a_frames_way(story: Story) -> None:
    """Each frame arrives whole, or the card says that it needs a reset. QEMU may have been asked about memory
    that is not mapped any more.
    """
    story.good("storm", "after_the_storm")
    warnings = story.moments["storm"].warnings
    assert [message for message in warnings if not message.endswith(NOWHERE)] == []
    said = story.said_between("registers", "storm")
    assert [line for line in said if "vtd_" not in line and "compression of faults" not in line] == []
