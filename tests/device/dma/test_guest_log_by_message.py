"""The log of written pages in memory that the client must be asked for: bits wait until they are settled."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from device._gate import Gate
from device.dma import DmaWindows
from device.dma._guest_log import MAX_OWED, GuestLog
from device.errors import DeviceError
from device.virtio._split import VirtQueue
from tests.device.dma.test_dirty import pages_of
from tests.device.driver_side import DriverRing, GuestMemory, guest_memory
from tests.device.remote_side import Ask, Client, client_of

PAGE = 4096
SIZE = (MAX_OWED + 1) * PAGE
LOG = 0x8000_0000
READ = ("read", LOG, 2)
WRITE = ("write", LOG, 2)


class World:
    """Memory that is here from address 0 on, and two pages of it that are asked for with the log."""

    def __init__(self, told: GuestMemory, client: Client) -> None:
        self.told, self.client = told, client
        self.dma = DmaWindows()
        self.dma.gate = Gate()
        self.memory = GuestMemory(size=SIZE, iova=0)
        self.memory.map_into(self.dma)
        self.dma.map(LOG, told.size, 3)
        self.dma.remote = client
        self.log = GuestLog(self.dma)
        self.log.start(LOG, LOG + told.size)

    def write(self, *pages: int) -> None:
        for page in pages:
            self.dma.write(page * PAGE, b"x")

    @property
    def bits(self) -> set[int]:
        return pages_of(self.told.read(LOG, self.told.size))

    def when(self, asked: Ask, action: Callable[[], object]) -> None:
        """Do it when the client is asked that for the first time, before it answers."""

        def meanwhile(ask: Ask) -> None:
            if ask == asked:
                self.client.meanwhile = lambda _: None
                action()

        self.client.meanwhile = meanwhile


@pytest.fixture
def world() -> Iterator[World]:
    with guest_memory(size=2 * PAGE, iova=LOG) as told, client_of(told) as client:
        made = World(told, client)
        yield made
        made.memory.close()


def test_bits_are_set_when_whoever_wrote_is_done(world: World) -> None:
    world.write(3, 9)
    assert (world.bits, world.client.asked) == (set(), [])
    assert world.log.owing
    assert world.dma.guest_log_owed
    assert world.dma.settle_guest_log()
    assert world.bits == {3, 9}
    assert not world.log.owing
    assert not world.log.unreachable


def test_two_messages_are_enough_for_what_lies_within_a_page_of_the_log(world: World) -> None:
    world.write(5, *range(8, 2000, 7), 5)
    assert world.dma.settle_guest_log()
    span = LOG, (8 + 1991 // 7 * 7) // 8 + 1
    assert world.client.asked == [("read", *span), ("write", *span)]
    assert world.bits == {5, *range(8, 2000, 7)}


def test_a_bit_that_is_there_already_is_not_written_again(world: World) -> None:
    world.told.write(LOG, b"\xff\xff")
    world.write(3, 9)
    assert world.dma.settle_guest_log()
    assert world.client.asked == [READ]


def test_bits_that_are_there_stay(world: World) -> None:
    world.told.write(LOG, b"\x81\x81")
    world.write(3, 9)
    assert world.dma.settle_guest_log()
    assert world.bits == {0, 7, 8, 15, 3, 9}


def test_nothing_is_asked_when_nothing_is_owed(world: World) -> None:
    assert world.dma.settle_guest_log()
    assert world.client.asked == []


def test_a_log_that_covers_itself_says_nothing_of_its_own_writes() -> None:
    low = 4 * PAGE
    with guest_memory(size=PAGE, iova=low) as told, client_of(told) as client:
        dma = DmaWindows()
        dma.map(low, PAGE, 3)
        dma.remote = client
        log = GuestLog(dma)
        log.start(low, low + 64)
        with guest_memory(dma, size=PAGE, iova=0):
            dma.write(0, b"x")
            assert dma.settle_guest_log()
            assert not log.owing
            assert pages_of(told.read(low, 64)) == {0}


def test_the_client_is_told_that_its_guests_log_is_written_to(world: World) -> None:
    world.dma.log_start(PAGE)
    world.write(3)
    assert world.dma.settle_guest_log()
    assert pages_of(world.dma.log_report(LOG, 2 * PAGE, PAGE)) == {0}


def test_a_message_is_no_longer_than_the_client_takes(world: World) -> None:
    world.dma.remote_limit = 2
    world.write(0, 31)
    assert world.dma.settle_guest_log()
    parts = [(LOG, 2), (LOG + 2, 2)]
    assert world.client.asked == [(kind, *part) for kind in ("read", "write") for part in parts]
    assert world.bits == {0, 31}


def test_what_was_written_before_it_is_turned_off_is_told_after(world: World) -> None:
    world.write(3)
    world.log.stop()
    world.write(9)
    assert world.log.owing
    assert world.dma.settle_guest_log()
    assert world.bits == {3}


@pytest.mark.parametrize("asked", [READ, WRITE])
def test_a_change_of_the_card_in_the_middle_loses_no_bit(world: World, asked: Ask) -> None:
    world.write(3, 7, 9)
    world.when(asked, world.dma.disturb)
    assert not world.dma.settle_guest_log()
    assert world.log.owing
    assert world.dma.settle_guest_log()
    assert world.bits == {3, 7, 9}
    assert not world.log.unreachable


@pytest.mark.parametrize("asked", [READ, WRITE])
def test_what_is_written_in_the_middle_is_told_too(world: World, asked: Ask) -> None:
    world.write(3, 9)
    world.when(asked, lambda: world.write(3, 4, 16000))
    assert world.dma.settle_guest_log()
    assert world.bits == {3, 4, 9, 16000}


@pytest.mark.parametrize("asked", [READ, WRITE])
def test_a_log_that_is_turned_on_anew_in_the_middle_leaves_out_what_the_one_before_is_owed(
    world: World, asked: Ask
) -> None:
    world.write(3, 9)
    world.when(asked, lambda: world.log.start(LOG + PAGE, LOG + 2 * PAGE))
    assert not world.dma.settle_guest_log()
    assert world.log.unreachable
    world.write(3, 4)
    assert world.dma.settle_guest_log()
    assert pages_of(world.told.read(LOG + PAGE, PAGE)) == {3, 4}


def test_a_page_that_the_log_before_is_owed_is_told_to_the_next(world: World) -> None:
    world.write(3)
    world.log.start(LOG + PAGE, LOG + 2 * PAGE)
    world.write(3)
    assert world.dma.settle_guest_log()
    assert pages_of(world.told.read(LOG, 2 * PAGE)) == {3 + 8 * PAGE}


def test_where_the_log_was_nothing_is_written_after_it_has_moved(world: World) -> None:
    world.write(3, 9)
    world.when(READ, lambda: world.log.start(LOG + PAGE, LOG + 2 * PAGE))
    assert not world.dma.settle_guest_log()
    assert world.client.asked == [READ]


def test_who_settles_gets_away_from_others_who_write_all_the_time(world: World) -> None:
    pages = iter(range(10, 1000))

    def write_on(_ask: Ask) -> None:
        world.write(next(pages))

    world.client.meanwhile = write_on
    world.write(3, 9)
    assert not world.dma.settle_guest_log()
    assert world.log.owing
    world.client.meanwhile = lambda _: None
    assert world.dma.settle_guest_log()
    assert world.bits == {3, 9, *range(10, next(pages))}


@pytest.mark.parametrize("asked", [READ, WRITE])
def test_who_would_settle_meanwhile_leaves_it_to_who_does(world: World, asked: Ask) -> None:
    seen: list[tuple[bool, bool]] = []
    world.write(3, 9)
    world.when(asked, lambda: seen.append((world.dma.settle_guest_log(), world.log.owing)))
    assert world.dma.settle_guest_log()
    assert seen == [(True, True)]
    assert world.client.asked == [READ, WRITE]


def test_a_client_that_does_not_answer_is_waited_for_once(world: World) -> None:
    def late() -> None:
        raise DeviceError(errno.ETIMEDOUT, "nothing")

    world.log.start(LOG + PAGE - 1, LOG + PAGE + 1)  # in two blocks of the log's memory
    world.write(0, 8)
    world.when(("read", LOG + PAGE, 1), late)
    assert world.dma.settle_guest_log()
    assert world.client.asked == [("read", LOG + PAGE, 1)]
    assert world.log.unreachable
    assert not world.log.owing


@pytest.mark.parametrize("asked", [READ, WRITE])
def test_a_log_whose_driver_has_gone_in_the_middle_is_complete_and_then_says_nothing(
    world: World, asked: Ask
) -> None:
    world.write(3, 9)
    world.when(asked, world.log.reset)
    assert world.dma.settle_guest_log()
    assert world.bits == {3, 9}
    world.write(4)
    assert not world.log.owing


def test_a_log_that_a_driver_left_tells_nobody_that_it_is_not_reached(world: World) -> None:
    world.write(3)
    world.log.reset()
    world.dma.unmap(LOG, world.told.size)
    assert world.dma.settle_guest_log()
    assert not world.log.owing
    assert not world.log.unreachable


@pytest.mark.parametrize("asked", [READ, WRITE])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN])
def test_a_log_that_the_client_refuses_says_that_bits_are_left_out(
    world: World, asked: Ask, number: int
) -> None:
    def refuse() -> None:
        raise DeviceError(number, "no")

    world.write(3, 9)
    world.when(asked, refuse)
    assert world.dma.settle_guest_log()
    assert world.log.unreachable
    assert not world.log.owing


def test_a_log_whose_window_goes_before_it_is_told_says_that_bits_are_left_out(world: World) -> None:
    world.write(3)
    world.dma.unmap(LOG, world.told.size)
    assert world.dma.settle_guest_log()
    assert world.log.unreachable


def test_a_log_whose_memory_comes_before_it_is_told_is_written_there(world: World) -> None:
    world.write(3)
    world.dma.unmap(LOG, world.told.size)
    world.told.map_into(world.dma)
    assert world.dma.settle_guest_log()
    assert world.bits == {3}
    assert world.client.asked == []
    assert not world.log.unreachable


def test_without_anybody_to_ask_bits_are_left_out(world: World) -> None:
    world.dma.remote = None
    world.write(3)
    assert world.log.unreachable
    assert not world.log.owing


def test_as_many_bits_as_can_wait_are_told_and_one_more_is_left_out(world: World) -> None:
    world.write(*range(MAX_OWED), MAX_OWED - 1)
    assert not world.log.unreachable
    world.write(MAX_OWED)
    assert world.log.unreachable
    assert world.dma.settle_guest_log()
    assert world.bits == set(range(MAX_OWED))


def test_a_queue_that_is_served_in_python_tells_when_it_answers(world: World) -> None:
    queue, ring = VirtQueue(world.dma, 0, 8), DriverRing(world.memory, 8)
    buffer = world.memory.allocate(64, PAGE)
    ring.add([(buffer, 64, True)])
    queue.enable(8, *ring.addresses)
    chain = queue.pop()
    assert chain is not None
    chain.write(b"answer")
    queue.push(chain, 6)
    assert world.bits == {buffer // PAGE, ring.device // PAGE}
    world.told.write(LOG, bytes(PAGE))
    queue.disable_kicks()
    assert world.bits == {ring.device // PAGE}
    world.told.write(LOG, bytes(PAGE))
    assert not queue.enable_kicks()
    assert world.bits == {ring.device // PAGE}
