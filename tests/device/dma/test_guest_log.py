"""The log of written pages in the guest's own memory, against a set of pages."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.dma import DmaWindows
from device.dma._guest_log import GuestLog
from device.errors import DeviceError
from tests.device.dma.test_dirty import pages_of, touched
from tests.device.driver_side import GuestMemory, guest_memory
from tests.device.remote_side import client_of

PAGE = 4096
SIZE = 0x100000
LOG = 0x7000_0000  # where the log's own memory is


def log_memory(dma: DmaWindows, prot: int = 3, by_message: tuple[bool, bool] = (False, False)) -> GuestMemory:
    """The log's two pages, each a window of its own."""
    memory = GuestMemory(size=2 * PAGE, iova=LOG)
    for page, asked in enumerate(by_message):
        dma.map(LOG + page * PAGE, PAGE, prot, None if asked else memory.fd, page * PAGE)
    return memory


def bits_in(memory: GuestMemory, base: int, end: int) -> set[int]:
    """The pages that the log tells, and that it has written to no byte beside it."""
    whole = memory.read(LOG, memory.size)
    assert not any(whole[: base - LOG])
    assert not any(whole[max(end, base) - LOG :])
    return pages_of(whole[base - LOG : end - LOG])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_bits_are_exactly_the_pages_written(data: st.DataObject) -> None:
    """Writes of any length to windows of both kinds, a log that begins and ends anywhere, in both kinds."""
    base = LOG + data.draw(st.integers(0, 2 * PAGE), label="base")
    end = data.draw(st.integers(base, LOG + 2 * PAGE) | st.integers(base, base + 40), label="end")
    end = min(end, LOG + 2 * PAGE)
    first = data.draw(st.sampled_from([0, SIZE, 7 * PAGE, (8 * (end - base) // 2) * PAGE]), label="first")
    dma = DmaWindows()
    log = GuestLog(dma)
    written: set[int] = set()
    with guest_memory(size=SIZE, iova=first) as memory, client_of(memory) as client:
        for part in range(4):
            by_message = data.draw(st.booleans(), label="by message")
            dma.map(
                first + part * SIZE // 4, SIZE // 4, 3, None if by_message else memory.fd, part * SIZE // 4
            )
        dma.remote = client
        told = log_memory(dma, by_message=data.draw(st.tuples(st.booleans(), st.booleans()), label="log"))
        client.beside = told
        dma.write(first, b"before")
        log.start(base, end)
        for _ in range(data.draw(st.integers(0, 8))):
            near = data.draw(st.integers(0, SIZE // PAGE)) * PAGE + data.draw(st.integers(-9, 9))
            at = min(max(near, 0), SIZE - 1)
            length = data.draw(st.integers(1, min(SIZE - at, 3 * PAGE)))
            dma.write(first + at, os.urandom(length))
            written |= touched(first + at, length, PAGE)
            if data.draw(st.booleans(), label="settled"):
                assert dma.settle_guest_log()
        log.stop()
        assert dma.settle_guest_log()
        assert not log.owing
        room = 8 * (end - base)
        assert bits_in(told, base, end) == {page for page in written if page < room}
        assert log.too_small == any(page >= room for page in written)
        assert not log.unreachable
        dma.write(first, bytes(SIZE))
        assert dma.settle_guest_log()
        assert bits_in(told, base, end) == {page for page in written if page < room}
        told.close()


def test_a_write_up_to_a_page_does_not_touch_it_and_one_over_it_does() -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0):
        told = log_memory(dma)
        log.start(LOG, LOG + 8)
        dma.write(3 * PAGE - 4, b"four")
        assert bits_in(told, LOG, LOG + 8) == {2}
        dma.write(5 * PAGE - 4, b"fiver")
        assert bits_in(told, LOG, LOG + 8) == {2, 4, 5}
        told.close()


def test_the_end_is_exclusive() -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0):
        told = log_memory(dma)
        log.start(LOG, LOG + 1)
        dma.write(7 * PAGE, b"x")
        assert not log.too_small
        dma.write(8 * PAGE, b"x")
        assert log.too_small
        assert bits_in(told, LOG, LOG + 1) == {7}
        told.close()


@pytest.mark.parametrize(
    ("base", "end"),
    [(LOG, LOG), (LOG + 8, LOG), (0, 0), (2**64 - 1, 0), (2**64 - 1, 2**64 - 2)],
    ids=["empty", "backwards", "zero", "wrapping", "at the top"],
)
def test_a_log_without_room_says_that_it_is_too_small(base: int, end: int) -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0):
        told = log_memory(dma)
        log.start(base, end)
        dma.write(0, b"x")
        assert (log.too_small, log.unreachable) == (True, False)
        assert not any(told.read(LOG, told.size))
        told.close()


@pytest.mark.parametrize("base", [LOG - PAGE, LOG + 2 * PAGE, 2**64 - 64])
def test_a_log_that_is_mapped_nowhere_says_so(base: int) -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0):
        told = log_memory(dma)
        log.start(base, base + 32)
        dma.write(0, b"x")
        assert (log.too_small, log.unreachable) == (False, True)
        assert not any(told.read(LOG, told.size))
        told.close()


@pytest.mark.parametrize("prot", [1, 2])
def test_a_log_that_may_not_be_read_and_written_says_that_it_is_not_reached(prot: int) -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0):
        told = log_memory(dma, prot)
        log.start(LOG, LOG + 32)
        dma.write(0, b"x")
        assert log.unreachable
        assert not any(told.read(LOG, told.size))
        told.close()


def test_a_log_whose_file_the_client_truncates_is_not_reached() -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0) as memory:
        told = log_memory(dma)
        log.start(LOG, LOG + 32)
        dma.write(0, b"x")
        assert not log.unreachable
        os.ftruncate(told.fd, 0)
        dma.write(0, b"x")
        assert log.unreachable, "the first bit that is lost is one of those that it tells of"
        dma.write(0, b"here still")
        assert memory.read(0, 10) == b"here still"
        told.bytes.close()
        os.close(told.fd)


def test_a_log_is_reached_again_when_its_window_is_back_and_it_is_turned_on_again() -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0):
        told = log_memory(dma)
        dma.unmap(LOG, told.size)
        log.start(LOG, LOG + 32)
        dma.write(0, b"x")
        assert log.unreachable
        told.map_into(dma)
        dma.write(PAGE, b"x")
        assert log.unreachable, "what was left out is left out"
        log.start(LOG, LOG + 32)
        assert not log.unreachable
        assert bits_in(told, LOG, LOG + 32) == {1}
        told.close()


def test_a_write_that_is_refused_sets_no_bit() -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=2 * PAGE, iova=0):
        told = log_memory(dma)
        log.start(LOG, LOG + 32)
        with pytest.raises(DeviceError):
            dma.write(PAGE, bytes(PAGE + 1))
        assert not any(told.read(LOG, told.size))
        told.close()


def test_the_client_is_told_of_the_log_as_of_any_other_write() -> None:
    dma = DmaWindows()
    log = GuestLog(dma)
    with guest_memory(dma, size=SIZE, iova=0):
        told = log_memory(dma)
        dma.log_start(PAGE)
        log.start(LOG, LOG + 2 * PAGE)
        dma.write(3 * PAGE, b"x")
        assert pages_of(dma.log_report(0, SIZE, PAGE)) == {3}
        assert pages_of(dma.log_report(LOG, 2 * PAGE, PAGE)) == {0}
        log.stop()
        dma.write(4 * PAGE, b"x")
        assert pages_of(dma.log_report(0, SIZE, PAGE)) == {4}, "the client's goes on"
        log.start(LOG, LOG + 2 * PAGE)
        dma.log_stop()
        dma.write(5 * PAGE, b"x")
        assert bits_in(told, LOG, LOG + 2 * PAGE) == {3, 5}, "and so does the guest's"
        told.close()
