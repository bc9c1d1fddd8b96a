"""What a card that carries frames says of it in the log of its live-migration block, against a model of the
driver's descriptors and rings.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from device.live_migration import LogStatus
from device.profiles import LIVE_MIGRATION_BAR
from device.virtio.features import Feature
from firmware import Nic
from tests.device.dma.test_dirty import pages_of, touched
from tests.device.driver_side import DriverRing
from tests.firmware.driver import ALL, HEADER, Driver, driver_of
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


@dataclass
class Told:
    """The log's memory, and what of it is the log."""

    driver: Driver
    base: int
    size: int

    def turn(self, control: int) -> None:
        for register, value in ((BASE, self.base), (END, self.base + self.size), (CONTROL, control)):
            width = 4 if register == CONTROL else 8
            self.driver.function.region_write(LIVE_MIGRATION_BAR, register, value.to_bytes(width, "little"))

    @property
    def status(self) -> LogStatus:
        return LogStatus(self.driver.function.region_read(LIVE_MIGRATION_BAR, STATUS, 1)[0])

    @property
    def pages(self) -> set[int]:
        return pages_of(self.driver.memory.read(self.base, self.size))


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
) -> None:
    """Frames into buffers anywhere, frames out, in a log that begins and ends anywhere."""
    wanted = ALL
    if not mergeable:
        wanted &= ~Feature.NET_MRG_RXBUF
    if not event_index:
        wanted &= ~Feature.RING_EVENT_IDX
    cable = Cable()
    with driver_of(Nic(cable, mac=MAC)) as driver:
        for ring, first in zip((driver.rx, driver.tx), rings, strict=True):
            ring.device = driver.memory.allocate(2 * PAGE, PAGE) + PAGE - first
        driver.start(wanted, buffers=0)
        driver.settle()
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
        driver.memory.write(told.base, bytes(size))
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
