"""The live-migration block as drivers of three generations find it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.card import NetworkCard
from device.function import ResetKind
from device.live_migration import LogStatus
from device.profiles import LIVE_MIGRATION_BAR, LIVE_MIGRATION_SIZE, parse_profile
from device.virtio.transport import Status
from tests.device.driver_side import DriverRing, GuestMemory, guest_memory
from tests.device.migration.moves import move
from tests.device.test_card import Quiet

PAGE = 4096
IOVA = 0x10000
CONTROL, STATUS, BASE, END, RINGS, PAIRS = 0x00, 0x08, 0x10, 0x18, 0x20, 0x28
IN_PAIRS = (0x20, 0x24, 0x60)  # of queues 0 to 2
IN_WORDS = (0x20, 0x24, 0x28)


class Block:
    """A card, and its block as a client writes it."""

    def __init__(self, profile: str = "n3000") -> None:
        self.card = NetworkCard(Quiet(), profile=parse_profile(profile), bar2_size=4096)
        self.card.make_movable({}, {})
        self.function = self.card.function

    def read(self, offset: int, count: int) -> int:
        return int.from_bytes(self.function.region_read(LIVE_MIGRATION_BAR, offset, count), "little")

    def write(self, offset: int, count: int, value: int) -> None:
        self.function.region_write(LIVE_MIGRATION_BAR, offset, value.to_bytes(count, "little"))

    def indices(self) -> list[tuple[int, int]]:
        return [(queue.last_avail, queue.used_index) for queue in self.card.queues]

    def place(self, *indices: tuple[int, int]) -> None:
        for queue, at in zip(self.card.queues, indices, strict=True):
            queue.place(*at)


@pytest.fixture
def block() -> Iterator[Block]:
    made = Block()
    yield made
    made.function.close()


@pytest.fixture
def memory(block: Block) -> Iterator[GuestMemory]:
    with guest_memory(block.function.dma, size=16 * PAGE, iova=IOVA) as memory:
        yield memory


# --- where ring state is


STATE = ((0x1234, 0x5678), (0xFFFF, 0), (7, 7))


@pytest.mark.parametrize("profile", ["n3000", "n3000:ring-state=pairs"])
def test_by_dwords_ring_state_is_in_pairs_and_the_number_of_pairs_between_them(profile: str) -> None:
    block = Block(profile)
    block.place(*STATE)
    block.write(PAIRS, 4, 1)
    assert [block.read(at, 4) for at in IN_PAIRS] == [avail | used << 16 for avail, used in STATE]
    assert block.read(PAIRS, 4) == 1
    assert block.indices() == list(STATE), "the number of pairs is no queue's"
    for at, (avail, used) in zip(IN_PAIRS, STATE, strict=True):
        block.write(at, 4, used | avail << 16)
    assert block.indices() == [(used, avail) for avail, used in STATE]
    block.function.close()


@pytest.mark.parametrize("profile", ["n3000", "n3000:ring-state=words"])
def test_by_sixteen_bits_ring_state_is_a_dword_a_queue(profile: str) -> None:
    block = Block(profile)
    block.place(*STATE)
    assert [block.read(at, 2) for at in IN_WORDS] == [avail for avail, _ in STATE]
    assert [block.read(at + 2, 2) for at in IN_WORDS] == [used for _, used in STATE]
    for number, at in enumerate(IN_WORDS, 40):
        block.write(at, 2, number)
    assert block.indices() == [(40, 40), (41, 41), (42, 42)], "with nothing in flight both are that"
    block.function.close()


def test_where_the_two_collide_the_width_decides(block: Block) -> None:
    block.write(PAIRS, 4, 0x0001_0002)
    block.write(PAIRS, 2, 77)
    assert (block.read(PAIRS, 4), block.read(PAIRS, 2)) == (0x0001_0002, 77)
    assert block.indices()[2] == (77, 77)


def test_linux_before_6_5_finds_the_third_queue_in_the_older_place_by_sixteen_bits(block: Block) -> None:
    block.write(IN_PAIRS[2], 2, 9)
    assert block.read(IN_PAIRS[2], 2) == block.read(IN_WORDS[2], 2) == 9


def test_a_layout_that_was_chosen_does_not_ask_for_the_width() -> None:
    pairs, words = Block("n3000:ring-state=pairs"), Block("n3000:ring-state=words")
    for block in (pairs, words):
        block.write(PAIRS, 4, 0x0003_0005)
    assert (pairs.read(PAIRS, 2), pairs.indices()[2]) == (5, (0, 0))
    assert (words.read(PAIRS, 2), words.indices()[2]) == (5, (5, 3))
    words.write(IN_PAIRS[2], 4, 8)
    assert words.indices()[2] == (5, 3), "there is nothing"
    for block in (pairs, words):
        block.function.close()


accesses = st.tuples(
    st.integers(0, LIVE_MIGRATION_SIZE - 8) | st.integers(0, 0x100),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(0, 2**64 - 1),
)


@pytest.mark.parametrize("layout", ["auto", "pairs", "words"])
@given(written=st.lists(accesses, max_size=20))
def test_no_access_can_fail(layout: str, written: list[tuple[int, int, int]]) -> None:
    block = Block(f"n3000:ring-state={layout}")
    for offset, count, value in written:
        block.write(offset, count, value & (1 << 8 * count) - 1)
        block.read(offset, count)
    assert block.read(CONTROL, 4) in (0, 1, 3)
    block.function.close()


def test_a_queue_that_runs_shows_where_it_is_and_does_not_let_itself_be_moved(
    block: Block, memory: GuestMemory
) -> None:
    """Until DRIVER_OK it does: not every driver enables it last."""
    queue = block.card.queues[0]
    ring = DriverRing(memory, 4)
    block.write(IN_PAIRS[0], 4, 0x0004_0004)
    queue.enable(4, *ring.addresses)
    block.write(IN_PAIRS[0], 4, 0x0006_0005)
    assert block.read(IN_PAIRS[0], 4) == 0x0006_0005
    block.card.transport.status = Status.DRIVER_OK
    block.write(IN_PAIRS[0], 4, 0)
    block.write(IN_WORDS[0], 2, 0)
    assert block.read(IN_PAIRS[0], 4) == 0x0006_0005


# --- the log


def test_three_values_of_control_mean_something_and_the_others_are_not_taken(block: Block) -> None:
    for value, shown in ((1, 1), (2, 1), (3, 3), (0xFFFFFFFF, 3), (0, 0), (4, 0)):
        block.write(CONTROL, 4, value)
        assert block.read(CONTROL, 4) == shown
        assert block.read(STATUS, 8) == (LogStatus.LOGGING if shown else 0)


@pytest.mark.parametrize("control", [1, 3])
@pytest.mark.parametrize("width", [4, 8])
def test_a_write_of_the_card_is_logged_where_base_and_end_say(
    block: Block, memory: GuestMemory, control: int, width: int
) -> None:
    """By dwords, low before high, as DPDK writes them, or at once."""
    base, end = IOVA + 0x100, IOVA + 0x100 + 8
    for register, value in ((BASE, base), (END, end)):
        for at in range(0, 8, width):
            block.write(register + at, width, value >> 8 * at & (1 << 8 * width) - 1)
    block.write(CONTROL, 4, control)
    block.function.dma.write(IOVA + 3 * PAGE, b"x")
    page = IOVA // PAGE + 3
    expected = bytearray(16)
    expected[page // 8] = 1 << page % 8
    assert memory.read(base, 16) == bytes(expected)
    block.write(CONTROL, 4, 0)
    block.function.dma.write(IOVA + 4 * PAGE, b"x")
    assert memory.read(base, 16) == bytes(expected)
    assert block.read(STATUS, 8) == 0


def test_status_tells_what_kept_bits_from_the_log_until_it_is_turned_on_again(
    block: Block, memory: GuestMemory
) -> None:
    block.write(BASE, 8, 0x9000_0000)
    block.write(END, 8, 0x9000_0003)
    block.write(CONTROL, 4, 1)
    block.function.dma.write(IOVA, b"x")
    assert block.read(STATUS, 8) == LogStatus.LOGGING | LogStatus.UNREACHABLE
    block.function.dma.write(IOVA + 8 * PAGE, b"x")
    assert block.read(STATUS, 8) == LogStatus.LOGGING | LogStatus.UNREACHABLE | LogStatus.TOO_SMALL
    block.write(STATUS, 8, 0)
    block.write(CONTROL, 4, 0)
    assert block.read(STATUS, 8) == LogStatus.UNREACHABLE | LogStatus.TOO_SMALL
    block.write(CONTROL, 4, 1)
    assert block.read(STATUS, 8) == LogStatus.LOGGING


def test_base_and_end_may_come_behind_control(block: Block, memory: GuestMemory) -> None:
    """So they do from DPDK as Debian builds it."""
    block.write(CONTROL, 4, 1)
    block.function.dma.write(IOVA + PAGE, b"x")
    assert block.read(STATUS, 8) == LogStatus.LOGGING | LogStatus.TOO_SMALL
    block.write(BASE, 8, IOVA)
    block.write(END, 8, IOVA + 64)
    block.function.dma.write(IOVA + 2 * PAGE, b"x")
    assert memory.read(IOVA, 64) == (1 << IOVA // PAGE + 2).to_bytes(64, "little")
    assert block.read(STATUS, 8) == LogStatus.LOGGING


def test_a_log_that_is_given_another_place_begins_anew_there(block: Block, memory: GuestMemory) -> None:
    block.write(BASE, 8, IOVA)
    block.write(END, 8, IOVA + 64)
    block.write(CONTROL, 4, 1)
    block.write(BASE, 8, 0)
    block.function.dma.write(IOVA + PAGE, b"x")
    assert not any(memory.read(IOVA, 64))
    assert block.read(STATUS, 8) == LogStatus.LOGGING | LogStatus.UNREACHABLE
    block.write(BASE, 8, IOVA + 32)
    assert block.read(STATUS, 8) == LogStatus.LOGGING
    block.function.dma.write(IOVA + PAGE, b"x")
    assert not any(memory.read(IOVA, 32))
    assert any(memory.read(IOVA + 32, 32))


def test_a_log_that_is_off_is_not_turned_on_by_its_place(block: Block, memory: GuestMemory) -> None:
    block.write(CONTROL, 4, 1)
    block.write(CONTROL, 4, 0)
    block.write(BASE, 8, IOVA)
    block.write(END, 8, IOVA + 64)
    block.function.dma.write(IOVA + PAGE, b"x")
    assert not any(memory.read(IOVA, 64))
    assert not block.read(STATUS, 8) & LogStatus.LOGGING


@pytest.mark.parametrize("kind", [None, *ResetKind])
def test_after_a_reset_nothing_is_written_to_where_a_log_was(
    block: Block, memory: GuestMemory, kind: ResetKind | None
) -> None:
    """The driver's own as well: memory that it gives back must not be written to."""
    block.write(BASE, 8, IOVA)
    block.write(END, 8, IOVA + 64)
    block.write(PAIRS, 4, 1)
    block.write(CONTROL, 4, 3)
    block.place((5, 5), (6, 6), (7, 7))
    if kind is None:
        block.function.region_write(0, 0x14, b"\0")
    else:
        block.function.reset(kind)
    if kind is ResetKind.LOST_CLIENT:
        memory.map_into(block.function.dma)
    block.function.dma.write(IOVA + PAGE, b"x")
    assert not any(memory.read(IOVA, 64))
    assert [block.read(at, 8) for at in range(0, 0x100, 8)] == [0] * 32


# --- hidden, and absent


def test_a_hidden_block_works_for_who_has_the_card_in_hand() -> None:
    block = Block("n3000:lm=hidden")
    assert block.card.live_migration is not None
    block.card.live_migration.write(IN_PAIRS[1], 4, 0x0003_0003)
    assert block.indices()[1] == (3, 3)
    block.function.close()


def test_a_plain_nic_has_no_block() -> None:
    assert Block("virtio").card.live_migration is None


# --- moving


def test_the_block_moves_with_its_card(block: Block, memory: GuestMemory) -> None:
    block.write(BASE, 8, IOVA)
    block.write(END, 8, IOVA + 3)
    block.write(CONTROL, 4, 3)
    block.write(PAIRS, 4, 9)
    block.place(*STATE)
    block.function.dma.write(IOVA + 15 * PAGE, b"x")
    assert block.read(STATUS, 8) == LogStatus.LOGGING | LogStatus.TOO_SMALL
    other = Block()
    memory.map_into(other.function.dma)
    move(block.function, other.function)
    for offset in range(0, 0x100, 4):
        assert other.read(offset, 4) == block.read(offset, 4), hex(offset)
    memory.write(IOVA, bytes(64))
    other.function.dma.write(IOVA, b"x")
    assert memory.read(IOVA, 3) == bytes([ord("x"), 0, 1])
    other.function.close()


def test_a_log_that_is_off_arrives_off(block: Block, memory: GuestMemory) -> None:
    other = Block()
    memory.map_into(other.function.dma)
    other.write(CONTROL, 4, 1)
    move(block.function, other.function)
    assert (other.read(CONTROL, 4), other.read(STATUS, 8)) == (0, 0)
    other.function.close()


@pytest.mark.parametrize(("control", "wrong"), [(2, 0), (4, 0), (0, 1), (1, 8), (3, 0x80)])
def test_a_log_that_no_block_has_is_refused(block: Block, control: int, wrong: int) -> None:
    part = block.card.live_migration
    assert part is not None
    part.stage(struct.pack("<IIQQQQB", 3, 0, 0, 0, 0, 0, 6))
    with pytest.raises(ValueError, match="control"):
        part.stage(struct.pack("<IIQQQQB", control, 0, 0, 0, 0, 0, wrong))


@given(st.binary(max_size=60) | st.binary(min_size=41, max_size=41))
def test_any_bytes_are_a_blocks_state_or_refused(data: bytes) -> None:
    block = Block()
    part = block.card.live_migration
    assert part is not None
    try:
        apply = part.stage(data)
    except ValueError:
        pass
    else:
        apply()
        assert part.save() == data
    block.function.close()
