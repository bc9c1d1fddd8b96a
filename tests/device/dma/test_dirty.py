"""The log of writes to the client's memory, against a set of pages."""

import errno
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.dma import DmaWindows
from device.dma._dirty import LOG_PAGE, MAX_CHUNKS, MAX_REPORT
from device.errors import DeviceError
from device.virtio._split import VirtQueue
from tests.device.driver_side import DriverRing, GuestMemory, guest_memory
from tests.device.remote_side import client_of

CHUNK = 128 << 20  # bytes of memory whose pages are kept together
SIZE = 0x40000


def pages_of(bits: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}


def touched(address: int, length: int, page_size: int) -> set[int]:
    return set(range(address // page_size, (address + length - 1) // page_size + 1))


page_sizes = st.integers(12, 21).map(lambda shift: 1 << shift)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_log_equals_a_set_of_pages(data: st.DataObject) -> None:
    """Windows of both kinds around the end of a chunk; writes and reports in any order, in any page size."""
    base = CHUNK - SIZE // 2
    dma = DmaWindows()
    model: set[int] = set()
    with guest_memory(size=SIZE, iova=base) as memory, client_of(memory) as client:
        for part in range(4):
            by_message = data.draw(st.booleans(), label="by message")
            at = part * SIZE // 4
            dma.map(base + at, SIZE // 4, 3, None if by_message else memory.fd, at)
        dma.remote = client
        dma.write(base, b"before")
        dma.log_start(data.draw(page_sizes))
        for _ in range(data.draw(st.integers(1, 8))):
            if data.draw(st.booleans(), label="write"):
                at = data.draw(st.integers(0, SIZE - 1))
                length = data.draw(st.integers(1, min(SIZE - at, 3 * LOG_PAGE)))
                dma.write(base + at, os.urandom(length))
                model |= touched(base + at, length, LOG_PAGE)
            else:
                page_size = data.draw(page_sizes)
                start = base // page_size * page_size
                length = page_size * data.draw(st.integers(1, SIZE // page_size + 1))
                inside = {page for page in model if start <= page * LOG_PAGE < start + length}
                told = pages_of(dma.log_report(start, length, page_size))
                assert told == {(page * LOG_PAGE - start) // page_size for page in inside}
                model -= inside
        assert pages_of(dma.log_report(base, SIZE, LOG_PAGE)) == {page - base // LOG_PAGE for page in model}


def test_a_report_has_eight_bytes_for_each_64_pages() -> None:
    dma = DmaWindows()
    dma.log_start(LOG_PAGE)
    assert [len(dma.log_report(0, n * LOG_PAGE, LOG_PAGE)) for n in (1, 64, 65)] == [8, 8, 16]


def test_a_log_that_is_started_again_is_empty_and_one_that_is_stopped_is_none() -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x4000, iova=0):
        assert not dma.logging
        dma.log_start(LOG_PAGE)
        assert dma.logging
        dma.write(0, b"x")
        dma.log_start(LOG_PAGE)
        assert dma.log_report(0, 0x4000, LOG_PAGE) == bytes(8)
        dma.log_stop()
        assert not dma.logging
        dma.write(0, b"x")
        with pytest.raises(DeviceError, match="no writes are logged"):
            dma.log_report(0, 0x4000, LOG_PAGE)


def test_what_was_written_is_told_though_its_window_is_gone() -> None:
    dma = DmaWindows()
    dma.log_start(LOG_PAGE)
    with guest_memory(dma, size=0x4000, iova=0):
        dma.write(0x2000, b"x")
        dma.unmap_all()
    assert pages_of(dma.log_report(0, 0x4000, LOG_PAGE)) == {2}


@pytest.mark.parametrize(
    ("iova", "length", "page_size"),
    [
        (0, 0, 4096),
        (0, 4096, 0),
        (0, 4096, 2048),
        (0, 12288, 12288),
        (4096, 8192, 8192),
        (0, 4096, 8192),
        (0, (1 << 64) - 1, 4096),
        ((1 << 64) - 4096, 8192, 4096),
        (0, (8 * MAX_REPORT + 1) * LOG_PAGE, LOG_PAGE),
        (0, 1 << 63, 4096),
    ],
)
def test_a_report_that_cannot_be_is_refused(iova: int, length: int, page_size: int) -> None:
    dma = DmaWindows()
    dma.log_start(LOG_PAGE)
    with pytest.raises(DeviceError) as refused:
        dma.log_report(iova, length, page_size)
    assert refused.value.errno == errno.EINVAL


def test_the_largest_report_is_given_and_the_last_page_is_one() -> None:
    dma = DmaWindows()
    dma.log_start(LOG_PAGE)
    assert dma.log_report(0, 8 * MAX_REPORT * LOG_PAGE, LOG_PAGE) == bytes(MAX_REPORT)
    with guest_memory(dma, size=0x1000, iova=(1 << 64) - 0x1000) as memory:
        dma.write(memory.iova + 0xFFF, b"x")
        assert dma.log_report(memory.iova, 0x1000, LOG_PAGE)[0] == 1


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4097])
def test_pages_that_cannot_be_are_not_logged(page_size: int) -> None:
    dma = DmaWindows()
    with pytest.raises(DeviceError):
        dma.log_start(page_size)
    assert not dma.logging


def test_beyond_the_limit_all_is_told_to_be_written() -> None:
    dma = DmaWindows()
    with guest_memory(size=LOG_PAGE, iova=0) as memory:
        for chunk in range(MAX_CHUNKS + 1):
            dma.map(chunk * CHUNK, LOG_PAGE, 3, memory.fd)
        dma.log_start(LOG_PAGE)
        for chunk in range(MAX_CHUNKS):
            dma.write(chunk * CHUNK, b"x")
        assert dma.log_report(5 * CHUNK, 2 * LOG_PAGE, LOG_PAGE)[0] == 1
        assert dma.log_report(5 * CHUNK, 2 * LOG_PAGE, LOG_PAGE)[0] == 0
        dma.write(MAX_CHUNKS * CHUNK, b"x")
        for _ in range(2):
            assert dma.log_report(5 * CHUNK, 2 * LOG_PAGE, LOG_PAGE) == b"\3" + bytes(7)


def test_a_write_that_is_on_its_way_is_told_before_and_after() -> None:
    dma = DmaWindows()
    told = []
    with guest_memory(size=0x4000, iova=0) as memory, client_of(memory) as client:
        dma.map(0, 0x4000, 3)
        dma.remote = client
        dma.log_start(LOG_PAGE)
        client.meanwhile = lambda _: told.append(pages_of(dma.log_report(0, 0x4000, LOG_PAGE)))
        dma.write(0x1000, b"x")
        assert told == [{1}]
        assert pages_of(dma.log_report(0, 0x4000, LOG_PAGE)) == {1}
        dma.read(0x2000, 1)
        assert told == [{1}, set()]


# --- rings


class Queue:
    """Its used ring begins on a page of its own, and has its event on another one."""

    def __init__(self, memory: GuestMemory, dma: DmaWindows, *, event_index: bool) -> None:
        self.dma = dma
        self.ring = DriverRing(memory, 1024)
        memory.allocate(0, LOG_PAGE)
        self.ring.device = memory.allocate(6 + 8 * 1024, LOG_PAGE)
        self.queue = VirtQueue(dma, 0, 1024)
        self.queue.enable(1024, *self.ring.addresses, event_index=event_index)

    def written(self) -> set[int]:
        """Pages of the used ring, from its own first on; nothing else may be told."""
        everything = pages_of(self.dma.log_report(0, 1 << 21, LOG_PAGE))
        return {page - self.ring.device // LOG_PAGE for page in everything}


@pytest.mark.parametrize("by_message", [False, True])
@pytest.mark.parametrize("event_index", [False, True])
def test_what_the_device_writes_into_a_ring_is_logged(by_message: bool, event_index: bool) -> None:
    dma = DmaWindows()
    with guest_memory() as memory, client_of(memory) as client:
        dma.map(memory.iova, memory.size, 3, None if by_message else memory.fd)
        dma.remote = client
        it = Queue(memory, dma, event_index=event_index)
        it.queue.restore(600, 600)
        it.ring.avail_index = 600
        address = memory.allocate(4)
        for _ in range(2):
            it.ring.add([(address, 4, False)])
        dma.log_start(LOG_PAGE)
        chain = it.queue.pop()
        assert chain is not None
        assert it.written() == set()
        it.queue.push(chain)
        assert it.written() == {0, 1}  # the index, and entry 600
        it.queue.enable_kicks()
        assert it.written() == ({2} if event_index else {0})
        it.queue.disable_kicks()
        assert it.written() == (set() if event_index or by_message else {0})
        assert struct.unpack("<H", memory.read(it.ring.device + 2, 2)) == (601,)
