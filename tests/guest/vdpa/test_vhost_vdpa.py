"""vhost-vdpa over each parent, behind a virtual IOMMU: what a program gets that has the card by it.

The program runs once for all sentences of a setting. The cards are served by our own engine alone, see
Limit.UNKNOWN_UNMAPS. Answers are those of Linux 6.12: drivers/vhost/vdpa.c, drivers/vdpa/ifcvf and
drivers/vdpa/virtio_pci.
"""

from __future__ import annotations

from typing import Final

import pytest
import trio

from device.profiles import QUEUES, parse_profile
from device.virtio.net import CONFIG_SIZE, CONTROL_QUEUE, RX_QUEUE, TX_QUEUE
from tests.guest import Root
from tests.guest.seen import Span, span
from tests.guest.vdpa.kernel_log import complaints
from tests.guest.vdpa.parents import IFCVF, PARENTS, Parent
from tests.guest.vdpa.vhost import BEGIN, HOSTILE, ROUNDS, SETTINGS, Look, Seen, Story, watch

# Of the driver in the kernel, which takes no features without it. vp_vdpa does.
NO_ACCESS_PLATFORM: Final = "VIRTIO_F_ACCESS_PLATFORM is not negotiated"

OWN, PAGE, MEMORY_PAGES = 0x1_0000_0000, 4096, 74
"""Where the program maps its memory."""
SENT_LATER: Final = 32 + 1
"""Frames of the program that wait while the queue is disabled, and its last."""

RUNNING, NEEDS_RESET, AT_REST = 0xF, 0x4F, 0
COMMON_QUEUE_MAX: Final = 256
"""Of vp_vdpa, whatever the card has (VP_VDPA_QUEUE_MAX)."""

LINUX_CONFIG_SIZE: Final = 24
"""Bytes of struct virtio_net_config in Linux 6.12, of which ifcvf shows no more."""

TOO_FAR: Final = "avail.idx is more than the queue size ahead"


@pytest.fixture(scope="module", params=list(SETTINGS))
def story(
    guest_root: Root, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Story:
    """The program, run to its end over both parents."""
    folders = {parent: tmp_path_factory.mktemp(parent.module) for parent in PARENTS}
    return trio.run(watch, guest_root, SETTINGS[request.param], folders)


@pytest.fixture(params=PARENTS, ids=str)
def seen(story: Story, request: pytest.FixtureRequest) -> Seen:
    """What was seen of each parent in turn."""
    return story.parents[request.param]


@pytest.fixture
def ifcvf(story: Story) -> Seen:
    """What was seen of the parent that has ring state."""
    return story.parents[IFCVF]


def each(name: str, answers: list[str], beyond: str = "ENOBUFS") -> dict[str, str]:
    """The answers for each queue, and for one that there is not."""
    return {f"{name}_{queue}": answer for queue, answer in enumerate([*answers, beyond])}


ANSWERS: Final = {
    "open_twice": "EBUSY",
    "device_id": "0x1",
    "queues": hex(QUEUES),
    "groups": "0x1",
    "address_spaces": "0x1",
    "backend_features": hex(1 << 1 | 1 << 2 | 1 << 3 | 1 << 8),  # messages V2, batches, ASIDs, persistent
    **each("descriptor_group", ["EOPNOTSUPP"] * QUEUES),
    "group_to_space_0": "EOPNOTSUPP",
    "group_to_space_1": "EINVAL",
    "ask_for_suspend": "EOPNOTSUPP",
    "ask_for_unknown": "EOPNOTSUPP",
    "log": "ENOTTY",
    "ring_without_owner": "EPERM",
    "owner": "done",
    "owner_twice": "EBUSY",
    "config_of_nothing": "EINVAL",
    "config_too_long": "EINVAL",
    "config_beyond": "EINVAL",
    "set_config": "done",
    "doorbell_to_read": "EINVAL",
    "doorbell_of_no_queue": "EINVAL",
    "doorbells_together": "EINVAL",
    "status": "0",
    "unknown_feature": "done",
    "unknown_feature_ok": "0x3",  # by the card: FEATURES_OK does not stay
    "set_features": "done",
    "features_ok": "0xb",
    "features_again": "EBUSY",
    "status_taken_back": "EINVAL",
    "base_0": "done",
    "base_10000": "EINVAL",
    "num_0": "EINVAL",
    "num_3": "EINVAL",
    "suspend_at_rest": "done",  # the kernel's own answer for a device that does not run
    "suspend": "EOPNOTSUPP",
    "resume": "EOPNOTSUPP",
    "base_while_running": "EINVAL",
    "addr_while_running": "EINVAL",
    "features_while_running": "EBUSY",
}
"""What both parents answer to each call, whatever the card."""


def answers_of(parent: Parent, queue_size: int) -> dict[str, str]:
    """The same of one parent, of a card with queues of this size."""
    sizes = each("size", [hex(queue_size)] * QUEUES)
    if parent is IFCVF:
        return sizes | {
            "vring_num": hex(queue_size),
            **each("group", ["0"] * QUEUES),
            "base_before_features": "done",
            "no_access_platform": "EINVAL",
            **each("get_base", ["0"] * QUEUES),
            "base_5": "done",
            "base_ffff": "done",
            **each("base_of", ["0xffff", "0", "0"]),
            **each("base_after_reset", ["0"] * QUEUES),
        }
    no_state = ["EOPNOTSUPP"] * QUEUES
    return sizes | {
        "vring_num": hex(COMMON_QUEUE_MAX),
        **each("group", no_state),
        "base_before_features": "EOPNOTSUPP",
        "no_access_platform": "done",
        **each("get_base", no_state),
        "base_5": "EOPNOTSUPP",
        "base_ffff": "EOPNOTSUPP",
        **each("base_of", no_state),
        **each("base_after_reset", no_state),
    }


def test_the_program_comes_to_its_end_and_nobody_complains(story: Story) -> None:
    for parent, seen in story.parents.items():
        seen.good(*(f"{part}_end" for part in story.setting.parts(parent)))
        assert [step for step in seen.steps.values() if not step.good] == []
    assert story.status == 0
    assert story.qemu_stderr == ""
    assert complaints(story.console, [NO_ACCESS_PLATFORM]) == []
    assert story.console.count(NO_ACCESS_PLATFORM) == 1


def test_every_call_has_its_answer(story: Story, seen: Seen) -> None:
    queue_size = parse_profile(story.setting.profiles[seen.parent]).queue_size
    expected = ANSWERS | answers_of(seen.parent, queue_size)
    assert {name: seen.steps[name].detail for name in expected} == expected


def test_features_and_configuration_are_the_cards(seen: Seen) -> None:
    size = LINUX_CONFIG_SIZE if seen.parent is IFCVF else CONFIG_SIZE
    assert seen.answers("config_size", "features", "config") == [
        hex(size),
        hex(seen.card.nic.offered_features()),
        seen.card.nic.config.encode()[:size].ljust(size, b"\0").hex(),
    ]
    seen.good("mac_is_read_only")


def test_memory_is_mapped_and_unmapped_by_messages_to_the_iotlb(story: Story, seen: Seen) -> None:
    assert seen.answers("map", "unmap", "unmap_nothing") == ["done"] * 3
    assert seen.answers("batch_begin", "batch_map", "batch_end", "batch_unmap") == ["done"] * 4
    assert seen.answers("map_twice", "map_nothing", "map_beyond", "map_no_memory") == [
        "EFAULT",
        "EINVAL",
        "EFAULT",
        "EFAULT",
    ]
    assert span(seen.look("map").windows) == Span(OWN, 4 * PAGE, PAGE, story.setting.shared)
    assert seen.look("unmap").windows == []
    assert span(seen.look("mapped").windows) == Span(OWN, MEMORY_PAGES * PAGE, PAGE, story.setting.shared)


@pytest.mark.parametrize(
    ("by", "before"),
    [("by_kick_eventfd", "mapped"), ("by_doorbell_page", "by_kick_eventfd")],
    ids=["eventfd", "doorbell page"],
)
def test_frames_pass_both_ways_by_either_kind_of_kick(seen: Seen, by: str, before: str) -> None:
    seen.good(by)
    after, then = seen.look(by).counters, seen.look(before).counters
    assert after["kicks"] > then["kicks"]
    assert after["tx_frames"] - then["tx_frames"] == after["rx_frames"] - then["rx_frames"] == 100


def test_calls_come_by_eventfd_where_the_driver_wants_them(story: Story, seen: Seen) -> None:
    seen.good("interrupt", "no_interrupt", "call_unbound", "call_bound_again", "frame_after_questions")
    if seen.parent is IFCVF and not story.setting.vector_per_queue:
        # ifcvf calls every queue back when it has one interrupt for all.
        assert "control 0" not in seen.steps["interrupt"].detail
    else:
        assert seen.answers("interrupt", "no_interrupt") == ["tx 1, control 0", "tx 0, control 0"]
    assert seen.steps["call_unbound"].detail.startswith("tx 0,")


def test_a_command_is_obeyed(seen: Seen) -> None:
    seen.good("command")
    assert seen.look("by_doorbell_page").promiscuous
    assert not seen.look("frames").promiscuous


def test_a_link_that_changes_is_told_by_the_eventfd_of_the_configuration(seen: Seen) -> None:
    seen.good("link_down", "link_up")


def test_memory_that_goes_from_under_the_rings_stops_them_until_it_is_back(seen: Seen) -> None:
    seen.good("invalidated", "updated")
    look = seen.look("invalidated")
    assert look.windows == []
    assert look.status == RUNNING
    assert all(queue.enabled for queue in look.queues)


def test_a_queue_that_is_disabled_leaves_its_ring_alone_and_goes_on_when_it_is_enabled(seen: Seen) -> None:
    seen.good("disabled", "enabled")
    look = seen.look("disabled")
    assert [queue.enabled for queue in look.queues] == [True, False, True]
    assert look.counters["tx_frames"] == seen.look("frames").counters["tx_frames"] - SENT_LATER
    assert look.queues[TX_QUEUE].last_avail == look.counters["tx_frames"]


def test_a_device_that_is_closed_leaves_nothing_in_the_card(seen: Seen) -> None:
    closed = seen.look("closed")
    assert (closed.windows, closed.status) == ([], AT_REST)
    assert not any(queue.enabled for queue in closed.queues)


def bases(look: Look) -> list[int]:
    """What VHOST_GET_VRING_BASE said of each queue at a stop."""
    return [int(word) for word in look.said.split()[:QUEUES]]


def test_ring_state_is_the_same_for_the_driver_the_rings_and_the_card_at_each_stop(ifcvf: Seen) -> None:
    stops = ifcvf.looks["stopped"]
    assert len(stops) == ROUNDS
    for look in stops:
        assert not any(queue.enabled for queue in look.queues)
        assert [int(word) for word in look.said.split()[QUEUES:]] == bases(look)
        assert [queue.last_avail for queue in look.queues] == bases(look)
        assert [queue.used_index for queue in look.queues] == bases(look)
        assert look.ring_state == bases(look)


def test_ring_state_counts_what_the_card_counts(story: Story, ifcvf: Seen) -> None:
    before = ifcvf.look("closed").counters
    for look in ifcvf.looks["stopped"]:
        moved = [(base - BEGIN) % 0x10000 for base in bases(look)]
        counted = [look.counters[name] - before[name] for name in ("rx_frames", "tx_frames")]
        held = [count - moved[queue] for queue, count in zip((RX_QUEUE, TX_QUEUE), counted, strict=True)]
        # A frame counts when it has been moved; the ring tells so later where the card has to ask for it.
        assert held == [0, 0] if story.setting.shared else min(held) >= 0


def test_no_frame_is_lost_and_none_comes_twice_over_stops_in_the_middle_of_traffic(ifcvf: Seen) -> None:
    """Each frame's number comes to the peer once and in order, and from there to the program."""
    ifcvf.good("rounds", "in_rings_at_stops", "under_way_at_stops", "indices_went_round")
    first, last = ifcvf.look("closed").frames, ifcvf.look("rounds").frames
    numbers = ifcvf.numbers[first:last]
    assert numbers == list(range(len(numbers)))
    assert ifcvf.steps["rounds"].detail == f"{len(numbers)} of {len(numbers)} frames, 0 wrong"
    assert len(numbers) >= 40 * ROUNDS
    counters = ifcvf.look("rounds").counters
    assert (counters["tx_dropped"], counters["rx_dropped"]) == (0, 0)


def test_a_command_that_lies_in_the_ring_at_a_stop_is_obeyed_once_after_it(ifcvf: Seen) -> None:
    ifcvf.good("commands")
    stops = ifcvf.looks["stopped"]
    assert [bases(look)[CONTROL_QUEUE] for look in stops] == [BEGIN + stop for stop in range(ROUNDS)]
    # Each but the first sees what the command before has made of it.
    assert [look.promiscuous for look in stops[1:]] == [stop % 2 == 1 for stop in range(ROUNDS - 1)]


@pytest.mark.parametrize("lie", HOSTILE)
def test_ring_state_that_the_rings_belie_breaks_the_queue_until_a_reset(ifcvf: Seen, lie: str) -> None:
    ifcvf.good(lie, f"{lie}_reset")
    assert ifcvf.steps[lie].detail == f"status {NEEDS_RESET:#x}"


def test_the_card_complains_of_lies_alone(seen: Seen) -> None:
    unknown = f"driver accepted features that were not offered: {1 << 62:#x}"
    lies = {
        f"card0: queue {TX_QUEUE} is broken: {TOO_FAR}",
        f"card0: queue {RX_QUEUE} is broken: {TOO_FAR}",
        f"card0: control queue: [Errno 5] queue {CONTROL_QUEUE} is broken: {TOO_FAR}",
    }
    assert set(seen.warnings) == {unknown} | (lies if seen.parent is IFCVF else set())


def test_nothing_is_left_in_the_card_after_all_of_it(ifcvf: Seen) -> None:
    left = ifcvf.look("hostile")
    assert (left.windows, left.status) == ([], AT_REST)
    assert left.ring_state == [0] * QUEUES
