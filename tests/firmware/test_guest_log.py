"""What a card that carries frames says of it in the log of its live-migration block, against a model of the
driver's descriptors and rings.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device.live_migration import LogStatus
from device.profiles import COMMON, LIVE_MIGRATION_BAR
from device.virtio.features import Feature
from device.virtio.net import CONTROL_QUEUE, TX_QUEUE
from device.virtio.transport import Status
from firmware import Nic
from tests.device.dma.test_dirty import pages_of, touched
from tests.device.driver_side import DriverRing, GuestMemory, guest_memory
from tests.device.migration.moves import move
from tests.device.remote_side import Ask, Client, client_of
from tests.firmware.driver import ALL, CONFIG_REGION, HEADER, Driver, driver_of
from tests.firmware.test_nic import MAC, Cable, frame

PAGE = 4096
CONTROL, STATUS, BASE, END = 0x00, 0x08, 0x10, 0x18
SPACE = 64 * PAGE  # where buffers are
UNTOUCHED = 0xEEEE  # no index that a ring of this size reaches in a test

Buffers = Sequence[tuple[int, int]]  # offset and length of each segment of a chain

segments = st.tuples(
    st.integers(0, 60).map(lambda page: page * PAGE) | st.integers(0, SPACE - 3 * PAGE),
    st.integers(-20, 20),
    st.integers(12, 60) | st.integers(12, 2 * PAGE),
).map(lambda drawn: (max(drawn[0] + drawn[1], 0), drawn[2]))
# Bytes of a used ring in its first page: the index alone, some of its entries, all but what asks for kicks.
splits = st.sampled_from([PAGE, 4, 4 + 8 * 2, 4 + 8 * 64])
chains = st.lists(segments, min_size=1, max_size=4)


LOG = 0x4000_0000  # a log's own memory


@dataclass
class Told:
    """What of `memory` is the log, or else of the driver's."""

    driver: Driver
    base: int
    size: int
    memory: GuestMemory | None = None

    def turn(self, control: int) -> None:
        for register, value in ((BASE, self.base), (END, self.base + self.size), (CONTROL, control)):
            width = 4 if register == CONTROL else 8
            self.driver.function.region_write(LIVE_MIGRATION_BAR, register, value.to_bytes(width, "little"))

    @property
    def status(self) -> LogStatus:
        return LogStatus(self.driver.function.region_read(LIVE_MIGRATION_BAR, STATUS, 1)[0])

    @property
    def pages(self) -> set[int]:
        return pages_of((self.memory or self.driver.memory).read(self.base, self.size))

    def forget(self) -> None:
        (self.memory or self.driver.memory).write(self.base, bytes(self.size))


@contextmanager
def asked_for(driver: Driver, at: int = 0, size: int = 2048) -> Iterator[tuple[Told, Client]]:
    """A log in memory that only the client reaches."""
    with guest_memory(size=PAGE, iova=LOG) as memory, client_of(memory) as client:
        with driver.function.gate:
            driver.function.dma.map(LOG, PAGE, 3)
            driver.function.dma.remote = client
        yield Told(driver, LOG + at, size, memory), client
        with driver.function.gate:
            driver.function.dma.remote = None


def received(frames: Sequence[int], offered: Sequence[Buffers], *, mergeable: bool) -> tuple[set[int], int]:
    """The pages of buffers that frames of these lengths touch, and how many buffers are used."""
    written: set[int] = set()
    used = 0
    for length in frames:
        left, taken = HEADER + length, 0
        for chain in offered[used:]:
            room = sum(size for _, size in chain)
            if room < left and not mergeable:
                break  # dropped, and the buffer serves the next
            taken += 1
            for offset, size in chain:
                part = min(size, left)
                if part:
                    written |= touched(offset, part, PAGE)
                left -= part
            if left == 0:
                break
        if left and mergeable:
            return written, used  # it waits for more buffers; those before have been written to
        if left == 0:
            used += taken
        elif used == len(offered):
            return written, used
    return written, used


def expect_asking(driver: Driver, ring: DriverRing) -> None:
    """Have it show later whether the card wrote that it wants kicks, or silence."""
    for place in (ring.device, ring.device + 4 + 8 * ring.size):
        driver.memory.write(place, UNTOUCHED.to_bytes(2, "little"))


def ring_pages(driver: Driver, ring: DriverRing, used: int) -> set[int]:
    """Pages of a used ring with `used` entries, its index, and the word that asks for silence or kicks."""
    written = touched(ring.device + 2, 2, PAGE) if used else set()
    for number in range(used):
        written |= touched(ring.device + 4 + 8 * (number % ring.size), 8, PAGE)
    for place in (ring.device, ring.device + 4 + 8 * ring.size):
        if driver.memory.read(place, 2) != UNTOUCHED.to_bytes(2, "little"):
            written |= touched(place, 2, PAGE)
    return written


@settings(max_examples=120, deadline=None)
@given(
    offered=st.lists(chains, max_size=8),
    lengths=st.lists(st.integers(14, 100) | st.integers(14, 3000), max_size=6),
    sent=st.integers(0, 5),
    mergeable=st.booleans(),
    event_index=st.booleans(),
    indirect=st.booleans(),
    at=st.integers(0, 40),
    size=st.sampled_from([2048, 1030, 1024]) | st.integers(0, 2048),
    rings=st.tuples(splits, splits),
    by_message=st.booleans(),
)
@example(
    offered=[[(PAGE - 12, 13)]],
    lengths=[14],
    sent=0,
    mergeable=False,
    event_index=True,
    indirect=False,
    at=0,
    size=2048,
    rings=(4, 4),
    by_message=False,
)  # dropped: it does not fit
def test_the_bits_are_exactly_the_pages_written(
    offered: list[list[tuple[int, int]]],
    lengths: list[int],
    sent: int,
    mergeable: bool,
    event_index: bool,
    indirect: bool,
    at: int,
    size: int,
    rings: tuple[int, int],
    by_message: bool,
) -> None:
    """Frames into buffers anywhere, frames out, in a log that begins and ends anywhere, here or not."""
    wanted = ALL
    if not mergeable:
        wanted &= ~Feature.NET_MRG_RXBUF
    if not event_index:
        wanted &= ~Feature.RING_EVENT_IDX
    cable = Cable()
    with ExitStack() as opened:
        driver = opened.enter_context(driver_of(Nic(cable, mac=MAC)))
        for ring, first in zip((driver.rx, driver.tx), rings, strict=True):
            ring.device = driver.memory.allocate(2 * PAGE, PAGE) + PAGE - first
        driver.start(wanted, buffers=0)
        driver.settle()
        if by_message:
            told, _ = opened.enter_context(asked_for(driver, at, size))
        else:
            told = Told(driver, driver.memory.allocate(PAGE, PAGE) + at, size)
        space = driver.memory.allocate(SPACE, PAGE)
        for ring in (driver.rx, driver.tx):
            expect_asking(driver, ring)
        told.turn(1)
        for chain in offered:
            add = driver.rx.add_indirect if indirect else driver.rx.add
            add([(space + offset, length, True) for offset, length in chain])
        for length in lengths:
            cable.network.send(frame(bytes(length - 14)))
        for _ in range(sent):
            driver.send(frame())
        driver.settle()
        buffers, used = received(
            lengths,
            [[(space + offset, length) for offset, length in chain] for chain in offered],
            mergeable=mergeable,
        )
        written = buffers | ring_pages(driver, driver.rx, used) | ring_pages(driver, driver.tx, sent)
        assert len(driver.rx.used()) == used
        assert told.pages == {page for page in written if page < 8 * size}
        assert bool(told.status & LogStatus.TOO_SMALL) == any(page >= 8 * size for page in written)
        assert not told.status & LogStatus.UNREACHABLE
        told.turn(0)
        told.forget()
        driver.send(frame())
        driver.settle()
        assert not told.pages


def test_control_commands_are_logged_where_their_answers_are() -> None:
    with driver_of(Nic(Cable(), mac=MAC)) as driver:
        driver.start(buffers=0)
        told = Told(driver, driver.memory.allocate(PAGE, PAGE), 2048)
        driver.memory.allocate(1, PAGE)
        expect_asking(driver, driver.commands)
        told.turn(3)
        assert driver.command(bytes([0, 0]), b"\1") == 0
        answer = driver.memory.allocate(0, 1) - 1
        assert answer // PAGE in told.pages
        assert told.pages == touched(answer, 1, PAGE) | ring_pages(driver, driver.commands, 1)


def test_traffic_goes_on_when_the_log_cannot_be_reached() -> None:
    cable = Cable()
    with driver_of(Nic(cable, mac=MAC)) as driver:
        driver.start()
        told = Told(driver, 1 << 60, 2048)
        told.turn(1)
        cable.network.send(frame(b"hello"))
        driver.send(frame(b"to you"))
        driver.settle()
        assert driver.received() == [frame(b"hello")]
        assert cable.network.recv(2000, socket.MSG_DONTWAIT) == frame(b"to you")
        assert told.status == LogStatus.LOGGING | LogStatus.UNREACHABLE


# --- a log that the client must be asked for


def counted(client: Client) -> list[str]:
    return [kind for kind, _, _ in client.asked]


def test_a_burst_costs_two_messages_however_many_frames_it_has() -> None:
    cable = Cable()
    with driver_of(Nic(cable, mac=MAC)) as driver:
        driver.start()
        driver.settle()
        with asked_for(driver) as (told, client):
            told.turn(1)
            for _ in range(10):
                cable.network.send(frame(b"hello"))
                driver.send(frame())
            driver.settle()
            assert counted(client)[:2] == ["read", "write"]
            assert len(driver.received()) == 10
            assert counted(client)[2:] == ["read"] * (len(client.asked) - 2)
            assert len(client.asked) < 6, "and looks for news later find that all is said"


def stop(driver: Driver, queue: int) -> bool:
    """Stop it, and look whether it has stopped."""
    driver.write(COMMON + 0x16, 2, queue)
    driver.write(COMMON + 0x1C, 2, 0)
    return driver.read(COMMON + 0x1C, 2) == 0


class InTheMiddle:
    """What is seen while the client is asked for the log the first time, by one who has the card's gate."""

    def __init__(self, client: Client, look: Callable[[], object]) -> None:
        self.seen: list[Any] = []

        def meanwhile(_: Ask) -> None:
            client.meanwhile = lambda _: None
            self.seen.append(look())

        client.meanwhile = meanwhile


@contextmanager
def about_to_be_told() -> Iterator[tuple[Driver, Told, Client]]:
    """A card that has a frame to send, and will say so in its log when it is served."""
    with driver_of(Nic(Cable(), mac=MAC)) as driver:
        driver.start()
        driver.settle()
        with asked_for(driver) as (told, client):
            told.turn(1)
            driver.send(frame())
            yield driver, told, client


def test_a_queue_has_stopped_when_the_log_is_complete() -> None:
    with about_to_be_told() as (driver, told, client):
        middle = InTheMiddle(client, lambda: stop(driver, TX_QUEUE))
        driver.settle()
        assert middle.seen == [False]
        assert driver.read(COMMON + 0x1C, 2) == 0
        assert touched(driver.tx.device, 12, PAGE) <= told.pages
        assert not told.status & LogStatus.UNREACHABLE


def test_a_log_that_is_turned_off_is_on_until_it_is_complete() -> None:
    with about_to_be_told() as (driver, told, client):

        def turn_off() -> LogStatus:
            told.turn(0)
            return told.status

        middle = InTheMiddle(client, turn_off)
        driver.settle()
        assert middle.seen == [LogStatus.LOGGING]
        assert told.status == 0
        assert touched(driver.tx.device, 12, PAGE) <= told.pages


def test_a_reset_is_complete_when_the_log_is() -> None:
    with about_to_be_told() as (driver, told, client):
        statuses: list[Status] = []

        def reset() -> None:
            for _ in range(2):  # the second while the first is not complete
                driver.status = 0
                statuses.append(driver.status)

        InTheMiddle(client, reset)
        driver.settle()
        assert statuses[0] == statuses[1] != 0
        assert driver.status == 0
        assert told.status == 0
        assert touched(driver.tx.device, 12, PAGE) <= told.pages


def test_a_reset_is_complete_also_when_the_log_may_not_be_written_any_more() -> None:
    with about_to_be_told() as (driver, _, client):
        InTheMiddle(client, lambda: driver.function.region_write(CONFIG_REGION, 4, b"\2\0"))
        driver.settle()
        driver.status = 0
        assert driver.status != 0
        driver.settle()
        assert driver.status == 0


def test_a_card_that_may_not_do_dma_writes_its_log_when_it_may_again() -> None:
    with about_to_be_told() as (driver, told, client):
        InTheMiddle(client, lambda: driver.function.region_write(CONFIG_REGION, 4, b"\2\0"))
        driver.settle()
        asked = len(client.asked)
        driver.settle()
        assert (told.pages, len(client.asked)) == (set(), asked)
        driver.function.region_write(CONFIG_REGION, 4, b"\6\0")
        driver.settle()
        assert touched(driver.tx.device, 12, PAGE) <= told.pages


def test_bits_on_their_way_stay_behind_when_the_card_moves_and_it_says_so() -> None:
    with about_to_be_told() as (driver, told, client), driver_of(Nic(Cable(), mac=MAC)) as other:
        InTheMiddle(client, driver.function.stop)
        driver.settle()
        other.function.dma.map(LOG, PAGE, 3)
        other.function.dma.remote = client
        move(driver.function, other.function)
        moved = Told(other, told.base, told.size)
        assert moved.status == LogStatus.LOGGING | LogStatus.UNREACHABLE
        assert told.status == LogStatus.LOGGING, "the card that stays may go on, and say it"


async def test_a_reset_is_complete_also_when_the_card_sleeps_with_bits_that_it_may_not_write() -> None:
    with about_to_be_told() as (driver, _, client):

        def forbid() -> int:
            driver.function.region_write(CONFIG_REGION, 4, b"\2\0")
            return driver.nic.datapath.counters()["sleeps"]

        middle = InTheMiddle(client, forbid)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(driver.nic.run)
                while not middle.seen or driver.nic.datapath.counters()["sleeps"] <= middle.seen[0]:
                    await trio.lowlevel.checkpoint()
                assert driver.function.dma.guest_log_owed
                driver.status = 0
                while driver.status:
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()


async def test_a_card_that_runs_tells_all_that_it_wrote(nursery: trio.Nursery) -> None:
    """Traffic and commands, in memory that is here, and a log that is not."""
    cable = Cable()
    with driver_of(Nic(cable, mac=MAC)) as driver:
        driver.start()
        async with trio.open_nursery() as running:
            with asked_for(driver) as (told, _):
                told.turn(1)
                running.start_soon(driver.nic.run)
                with trio.fail_after(20):
                    for number in range(20):
                        cable.network.send(frame(bytes([number])))
                        assert await driver.receive() == frame(bytes([number]))
                    assert driver.command(bytes([0, 0]), b"\1") is None
                    await driver.interrupted(CONTROL_QUEUE)
                    answer = driver.memory.allocate(0, 1) - 1
                    for queue in range(3):
                        while not stop(driver, queue):
                            await trio.lowlevel.checkpoint()
                assert touched(driver.rx.device, 4 + 8 * 20, PAGE) <= told.pages
                assert touched(driver.commands.device, 12, PAGE) | touched(answer, 1, PAGE) <= told.pages
                assert told.status == LogStatus.LOGGING
                running.cancel_scope.cancel()
