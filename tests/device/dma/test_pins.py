"""Memory that is held: what a pin keeps, what it is refused, and what goes only when it is released."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from device._gate import Gate
from device.dma import (
    MAX_PINNED_PAGES,
    MAX_PINS,
    PAGE_SIZE,
    DmaWindows,
    Pin,
    PinCounters,
    PinnedError,
)
from device.dma._counts import SMALL_PAGE
from device.errors import DeviceError
from tests.device.driver_side import GuestMemory, guest_memory

READ, WRITE = 1, 2
IOVA = 0x10000
SIZE = 16 * PAGE_SIZE
HUGE = 2 << 20


@pytest.fixture
def dma() -> DmaWindows:
    made = DmaWindows()
    made.gate = Gate()
    return made


@pytest.fixture
def memory(dma: DmaWindows) -> Iterator[GuestMemory]:
    with guest_memory(dma, size=SIZE, iova=IOVA) as made:
        yield made


def refusal(call: object, *args: object) -> int | None:
    with pytest.raises(DeviceError) as refused:
        call(*args)  # type: ignore[operator]
    return refused.value.errno


def balance(dma: DmaWindows) -> int:
    """Pages that are pinned."""
    counters = dma.pins.counters
    return counters.acquired - counters.released


def mappings(fd: int) -> int:
    """How often the file is mapped in this process."""
    inode = f" {os.fstat(fd).st_ino} "
    return Path("/proc/self/maps").read_text("utf-8").count(inode)


# --- what a pin is


def test_its_views_are_the_clients_bytes(dma: DmaWindows, memory: GuestMemory) -> None:
    memory.write(IOVA + 0x1FFE, b"abcd")
    with dma.pin(IOVA + 0x1FFE, 4, READ | WRITE, "test") as pin:
        (view,) = pin.views
        assert bytes(view) == b"abcd"
        view[0:2] = b"xy"
    assert memory.read(IOVA + 0x1FFE, 4) == b"xycd"


def test_a_pin_to_read_has_views_that_cannot_be_written_to(dma: DmaWindows, memory: GuestMemory) -> None:
    with dma.pin(IOVA, 1, READ, "test") as pin:
        assert pin.views[0].readonly


def test_it_may_lie_in_several_windows(dma: DmaWindows) -> None:
    with guest_memory(size=SIZE) as memory:
        dma.map(0x1000, 0x1000, 3, memory.fd, 0x3000)
        dma.map(0x2000, 0x1000, 3, memory.fd, 0)
        dma.map(0x3000, 0x1000, 1, memory.fd, 0x1000)
        memory.bytes[0x3FFF:0x4000], memory.bytes[0:1], memory.bytes[0x1000:0x1001] = b"a", b"b", b"c"
        with dma.pin(0x1FFF, 0x1002, READ, "test") as pin:
            assert pin.spans == [(0x1FFF, 1), (0x2000, 0x1000), (0x3000, 1)]
            assert [bytes(view[:1]) for view in pin.views] == [b"a", b"b", b"c"]
            assert pin.pages == 3
        assert refusal(dma.pin, 0x2FFF, 2, WRITE, "test") == errno.EFAULT  # the last may only be read
        assert dma.pins.counters == PinCounters(3, 3)


def test_it_may_end_at_the_top_of_the_address_space(dma: DmaWindows) -> None:
    top = (1 << 64) - PAGE_SIZE
    with guest_memory(dma, size=PAGE_SIZE, iova=top):
        with dma.pin(top, PAGE_SIZE, WRITE, "test"):
            with pytest.raises(PinnedError):
                dma.unmap(top, PAGE_SIZE)
            assert refusal(dma.pin, top + 1, PAGE_SIZE, READ, "test") == errno.EFAULT
        assert dma.unmap(top, PAGE_SIZE) == PAGE_SIZE


@pytest.mark.parametrize(
    ("iova", "length", "prot", "code"),
    [
        (IOVA, 0, READ, errno.EINVAL),
        (IOVA, 1, 0, errno.EINVAL),
        (IOVA, 1, 4, errno.EINVAL),
        (IOVA - 1, 2, READ, errno.EFAULT),
        (IOVA + SIZE - 1, 2, READ, errno.EFAULT),
        (0x1000, 0x2000, READ, errno.EFAULT),  # a hole behind it
        (0x1000, 1, WRITE, errno.EFAULT),  # may only be read
        (0x8000, 1, READ, errno.EOPNOTSUPP),  # by message only
        (0x7FFF, 2, READ, errno.EOPNOTSUPP),  # the second byte is
    ],
)
def test_what_cannot_be_held_is_refused_whole(
    dma: DmaWindows, memory: GuestMemory, iova: int, length: int, prot: int, code: int
) -> None:
    dma.map(0x1000, 0x1000, READ, memory.fd, 0)
    dma.map(0x7000, 0x1000, 3, memory.fd, 0)
    dma.map(0x8000, 0x1000, 3)
    assert refusal(dma.pin, iova, length, prot, "test") == code
    assert dma.pins.counters == PinCounters(0, 0)
    assert dma.unmap(0, 1 << 32) == SIZE + 0x3000


def test_nobody_makes_a_pin_but_the_windows() -> None:
    with pytest.raises(TypeError, match="DmaWindows"):
        Pin()


# --- what does not go


def test_a_window_that_is_held_is_not_unmapped_and_stays_usable(dma: DmaWindows, memory: GuestMemory) -> None:
    with dma.pin(IOVA + PAGE_SIZE, 1, READ, "the engine"):
        with pytest.raises(PinnedError, match=r"0x10000 to 0x1ffff is held by the engine") as refused:
            dma.unmap(IOVA, SIZE)
        assert (refused.value.errno, refused.value.first, refused.value.last) == (
            errno.EBUSY,
            IOVA,
            IOVA + SIZE - 1,
        )
        dma.write(IOVA, b"still")
        assert dma.read(IOVA, 5) == b"still"
    assert dma.unmap(IOVA, SIZE) == SIZE


def test_of_several_windows_none_goes_when_one_is_held(dma: DmaWindows, memory: GuestMemory) -> None:
    for page in range(4):
        dma.map(PAGE_SIZE * page, PAGE_SIZE, 3, memory.fd, 0)
    with dma.pin(2 * PAGE_SIZE, 1, READ, "test"):
        with pytest.raises(PinnedError):
            dma.unmap(0, 4 * PAGE_SIZE)
        assert len(dma) == 5
        assert dma.unmap(0, 2 * PAGE_SIZE) == 2 * PAGE_SIZE
    assert dma.unmap(0, 4 * PAGE_SIZE) == 2 * PAGE_SIZE


def test_a_span_that_would_cut_a_window_is_wrong_whoever_holds_it(
    dma: DmaWindows, memory: GuestMemory
) -> None:
    with dma.pin(IOVA, 1, READ, "test"):
        assert refusal(dma.unmap, IOVA, PAGE_SIZE) == errno.EINVAL


def test_who_holds_it_is_told_each_once_and_not_without_end(dma: DmaWindows, memory: GuestMemory) -> None:
    for number in (1, 1, 2, 3, 4, 5, 6):
        dma.pin(IOVA, 1, READ, f"holder {number}")
    with pytest.raises(PinnedError, match=r"by holder 1, holder 2, holder 3, holder 4 and 2 more$"):
        dma.pins.check()


def test_twice_held_is_twice_released_and_a_release_is_once(dma: DmaWindows, memory: GuestMemory) -> None:
    first, second = (dma.pin(IOVA, PAGE_SIZE, READ, "test") for _ in range(2))
    assert dma.pins.maybe_pinned(IOVA)
    first.release()
    first.release()
    assert first.released
    assert dma.pins.maybe_pinned(IOVA)
    with pytest.raises(PinnedError):
        dma.unmap(IOVA, SIZE)
    second.release()
    assert not dma.pins.maybe_pinned(IOVA)
    assert dma.pins.counters == PinCounters(2, 2)
    assert dma.unmap(IOVA, SIZE) == SIZE


def test_a_page_is_known_to_be_pinned_through_any_window_on_it(dma: DmaWindows, memory: GuestMemory) -> None:
    dma.map(0x1000, PAGE_SIZE, 3, memory.fd, 5 * PAGE_SIZE)
    with dma.pin(IOVA + 5 * PAGE_SIZE, 1, READ, "test"):
        assert dma.pins.maybe_pinned(0x1000)
        assert not dma.pins.maybe_pinned(IOVA + 4 * PAGE_SIZE)
        assert not dma.pins.maybe_pinned(0x5000)  # no window
        assert dma.unmap(0x1000, PAGE_SIZE) == PAGE_SIZE  # but it is the window that is held


# --- huge pages


def test_a_huge_page_is_counted_as_what_it_consists_of(dma: DmaWindows) -> None:
    fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.truncate(fd, 4 * HUGE)
    dma.map(0, 4 * HUGE, 3, fd)  # nothing is touched, so no huge page need be there
    with dma.pin(HUGE - PAGE_SIZE, HUGE + 2 * PAGE_SIZE, READ, "test") as pin:
        assert pin.pages == 1 + 512 + 1
        assert [dma.pins.maybe_pinned(at * HUGE) for at in range(4)] == [True, True, True, False]
    assert dma.pins.counters == PinCounters(514, 514)
    dma.unmap_all()
    os.close(fd)


def test_a_file_in_the_place_of_another_has_its_own_pages(dma: DmaWindows, memory: GuestMemory) -> None:
    dma.pin(IOVA, 1, READ, "test").release()
    dma.unmap(IOVA, SIZE)
    fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    os.truncate(fd, HUGE)
    dma.map(0, HUGE, 3, fd)
    with dma.pin(0, 1, READ, "test"):
        assert dma.pins.maybe_pinned(HUGE - 1)
    os.close(fd)


# --- limits


def test_so_many_spans_are_held_and_no_more(dma: DmaWindows, memory: GuestMemory) -> None:
    pins = [dma.pin(IOVA, 1, READ, "test") for _ in range(MAX_PINS)]
    assert dma.pins.spans == MAX_PINS
    assert refusal(dma.pin, IOVA, 1, READ, "test") == errno.ENOSPC
    pins.pop().release()
    dma.pin(IOVA, 1, READ, "test")
    dma.unmap_all()
    memory.map_into(dma)
    assert refusal(dma.pin, IOVA, 1, READ, "test") == errno.ENOSPC  # the holders have not let go


def test_so_many_pages_are_held_and_no_more(dma: DmaWindows) -> None:
    with guest_memory(size=PAGE_SIZE) as memory:
        length = MAX_PINNED_PAGES * PAGE_SIZE
        os.truncate(memory.fd, length + PAGE_SIZE)
        dma.map(0, length + PAGE_SIZE, 3, memory.fd)
        with dma.pin(0, length, READ, "test"):
            assert refusal(dma.pin, 0, 1, READ, "test") == errno.ENOMEM
        assert refusal(dma.pin, 0, length + 1, READ, "test") == errno.ENOMEM
        with dma.pin(1, length - 1, READ, "test") as pin:
            assert pin.pages == MAX_PINNED_PAGES


# --- the client goes, and its memory does not


@pytest.mark.parametrize("late", [False, True])
def test_what_is_held_when_the_client_goes_stays_mapped(
    dma: DmaWindows, memory: GuestMemory, late: bool
) -> None:
    before = mappings(memory.fd)
    pin = dma.pin(IOVA, SIZE, READ | WRITE, "test")
    dma.unmap_all()
    assert pin.revoked
    assert balance(dma) == SIZE // PAGE_SIZE
    (view,) = pin.views
    view[0:4] = b"late"
    assert memory.read(IOVA, 4) == b"late"
    assert mappings(memory.fd) == before
    if late:
        memory.map_into(dma)  # the next client's window, in the same place
        with dma.pin(IOVA, 1, READ, "another"):
            pin.release()
            with pytest.raises(PinnedError, match="another"):
                dma.unmap(IOVA, SIZE)
        assert dma.unmap(IOVA, SIZE) == SIZE
    else:
        pin.release()
    assert balance(dma) == 0
    del view, pin
    assert mappings(memory.fd) == before - 1


def test_who_looks_at_a_view_that_was_released_sees_memory_that_is_there(
    dma: DmaWindows, memory: GuestMemory
) -> None:
    pin = dma.pin(IOVA, SIZE, READ, "test")
    whole = pin.views[0]
    part = whole[0:4]
    pin.release()
    dma.unmap(IOVA, SIZE)
    with pytest.raises(ValueError, match="released"):
        whole[0]
    assert bytes(part) == bytes(4)


def test_a_view_that_somebody_exports_hinders_no_release(dma: DmaWindows, memory: GuestMemory) -> None:
    pin = dma.pin(IOVA, SIZE, READ, "test")
    with memoryview(pin.views[0]):
        pin.release()
    assert balance(dma) == 0


def test_a_file_that_grows_is_mapped_again_and_the_views_stay(dma: DmaWindows, memory: GuestMemory) -> None:
    before = mappings(memory.fd)
    with dma.pin(IOVA, SIZE, READ, "test") as pin:
        os.truncate(memory.fd, 2 * SIZE)
        dma.map(0x100000, SIZE, 3, memory.fd, SIZE)
        dma.write(IOVA, b"seen")
        assert bytes(pin.views[0][:4]) == b"seen"
        assert mappings(memory.fd) == before + 1
    assert mappings(memory.fd) == before


def test_a_file_that_is_truncated_under_a_pin_ends_nobody(dma: DmaWindows, memory: GuestMemory) -> None:
    memory.write(IOVA, b"gone")
    pin = dma.pin(IOVA, SIZE, READ | WRITE, "test")
    dma.unmap_all()  # the guard stays with the pin
    os.truncate(memory.fd, 0)
    assert bytes(pin.views[0][:4]) == bytes(4)
    pin.views[0][0] = 1
    pin.release()


def test_what_the_client_has_truncated_is_not_pinned(dma: DmaWindows, memory: GuestMemory) -> None:
    os.truncate(memory.fd, 0)
    assert refusal(dma.read, IOVA, 1) == errno.EFAULT
    assert refusal(dma.pin, IOVA, 1, READ, "test") == errno.EFAULT
    assert balance(dma) == 0


def test_windows_that_are_forgotten_take_nothing_from_who_holds_them(memory: GuestMemory) -> None:
    dma = DmaWindows()
    memory.map_into(dma)
    memory.write(IOVA, b"kept")
    pin = dma.pin(IOVA, SIZE, READ, "test")
    (view,) = pin.views
    del dma, pin
    gc.collect()
    assert bytes(view[:4]) == b"kept"


# --- memory that others have mapped


def test_memory_that_is_lent_stays_for_the_pin_when_its_owner_unmaps_it(dma: DmaWindows) -> None:
    lent = mmap.mmap(-1, 4 * PAGE_SIZE)
    lent[PAGE_SIZE : PAGE_SIZE + 4] = b"lent"
    address = ctypes.addressof(ctypes.c_char.from_buffer(lent))
    dma.map_memory(0, 4 * PAGE_SIZE, 3, address)
    pin = dma.pin(PAGE_SIZE + 1, 3, READ, "test")
    dma.unmap_all()
    lent.close()
    assert bytes(pin.views[0]) == b"ent"
    pin.release()


def test_memory_that_is_lent_and_not_shared_cannot_be_kept(dma: DmaWindows) -> None:
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as lent:
        dma.map_memory(0, PAGE_SIZE, 3, ctypes.addressof(ctypes.c_char.from_buffer(lent)))
        assert refusal(dma.pin, 0, 1, READ, "test") == errno.EOPNOTSUPP
        assert balance(dma) == 0
        assert dma.unmap(0, PAGE_SIZE) == PAGE_SIZE


# --- waiting


def test_nothing_new_is_pinned_in_what_is_about_to_go(dma: DmaWindows, memory: GuestMemory) -> None:
    dma.map(0x1000, PAGE_SIZE, 3, memory.fd, 0)
    told: list[int] = []
    held = dma.pin(IOVA, 1, READ, "test")
    with dma.pins.leaving(IOVA, IOVA + SIZE - 1, lambda: told.append(len(dma.pins))):
        assert refusal(dma.pin, IOVA + PAGE_SIZE, 1, READ, "test") == errno.EAGAIN
        elsewhere = dma.pin(0x1000, 1, READ, "test")
        elsewhere.release()
        assert told == []
        held.release()
        assert told == [0]
        assert refusal(dma.pin, IOVA + PAGE_SIZE, 1, READ, "test") == errno.EAGAIN
    dma.pin(IOVA, 1, READ, "test").release()
    assert told == [0]


def test_who_waits_for_nothing_is_told_at_once_and_who_waits_for_the_lost_too(
    dma: DmaWindows, memory: GuestMemory
) -> None:
    told: list[str] = []
    with dma.pins.leaving(0, IOVA - 1, lambda: told.append("nothing")):
        assert told == ["nothing"]
    pin = dma.pin(IOVA, 1, READ, "test")
    with dma.pins.leaving(IOVA, IOVA, lambda: told.append("lost")):
        dma.unmap_all()
        assert told == ["nothing", "lost"]
        pin.release()
    assert told == ["nothing", "lost"]


def test_only_one_waits(dma: DmaWindows) -> None:
    with (
        dma.pins.leaving(0, 1, list),
        pytest.raises(RuntimeError, match="already"),
        dma.pins.leaving(2, 3, list),
    ):
        pass


def test_any_thread_may_release(dma: DmaWindows, memory: GuestMemory) -> None:
    told = threading.Event()
    pins = [dma.pin(IOVA, SIZE, WRITE, "test") for _ in range(50)]
    with dma.pins.leaving(IOVA, IOVA, told.set):
        threads = [threading.Thread(target=pin.release) for pin in pins for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert told.is_set()
    assert balance(dma) == 0


# --- the log of writes


def written(dma: DmaWindows) -> set[int]:
    bits = int.from_bytes(dma.log_report(IOVA, SIZE, PAGE_SIZE), "little")
    return {page for page in range(SIZE // PAGE_SIZE) if bits >> page & 1}


def test_what_is_held_to_be_written_to_counts_as_written_in_every_report(
    dma: DmaWindows, memory: GuestMemory
) -> None:
    dma.log_start(PAGE_SIZE)
    to_read = dma.pin(IOVA, PAGE_SIZE, READ, "test")
    to_write = dma.pin(IOVA + 2 * PAGE_SIZE - 1, 2, WRITE, "test")
    assert written(dma) == {1, 2}
    assert written(dma) == {1, 2}
    to_read.release()
    to_write.release()
    assert written(dma) == {1, 2}
    assert written(dma) == set()


def test_it_counts_when_the_log_begins_later_and_not_in_the_next_clients(
    dma: DmaWindows, memory: GuestMemory
) -> None:
    pin = dma.pin(IOVA, PAGE_SIZE, WRITE, "test")
    dma.log_start(PAGE_SIZE)
    assert written(dma) == {0}
    dma.unmap_all()
    dma.log_stop()
    memory.map_into(dma)
    dma.log_start(PAGE_SIZE)
    pin.release()
    assert written(dma) == set()


# --- anything in any order


class Holding(RuleBasedStateMachine):
    """Windows, pins, unmaps and disconnects, beside a model of what must be there."""

    pages = 12

    def __init__(self) -> None:
        super().__init__()
        self.dma = DmaWindows()
        self.memory = GuestMemory(self.pages * SMALL_PAGE, 0)
        self.windows: dict[int, int] = {}  # first page and pages
        self.held: list[tuple[Pin, int, int]] = []
        self.left: list[Pin] = []
        self.acquired = self.released = 0

    def teardown(self) -> None:
        for pin, _, _ in self.held:
            pin.release()
        for pin in self.left:
            pin.release()
        assert self.dma.pins.acquired == self.dma.pins.released == self.acquired
        assert (len(self.dma.pins), self.dma.pins.spans) == (0, 0)
        self.dma.unmap_all()
        assert mappings(self.memory.fd) == 1
        self.memory.close()

    def window_of(self, page: int) -> int | None:
        return next((first for first, count in self.windows.items() if first <= page < first + count), None)

    @rule(first=st.integers(0, 11), count=st.integers(1, 4))
    def map(self, first: int, count: int) -> None:
        count = min(count, self.pages - first)
        if any(self.window_of(page) is not None for page in range(first, first + count)):
            return
        self.dma.map(first * SMALL_PAGE, count * SMALL_PAGE, 3, self.memory.fd, first * SMALL_PAGE)
        self.windows[first] = count

    @rule(first=st.integers(0, 11), count=st.integers(1, 12), prot=st.integers(1, 3))
    def pin(self, first: int, count: int, prot: int) -> None:
        there = all(self.window_of(page) is not None for page in range(first, first + count))
        try:
            pin = self.dma.pin(first * SMALL_PAGE, count * SMALL_PAGE, prot, "model")
        except DeviceError:
            assert not there
            return
        assert there
        self.held.append((pin, first, count))
        self.acquired += count

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0))
    def release(self, which: int) -> None:
        pin, _, count = self.held.pop(which % len(self.held))
        pin.release()
        self.released += count

    @precondition(lambda self: self.windows)
    @rule(which=st.integers(0))
    def unmap(self, which: int) -> None:
        first = sorted(self.windows)[which % len(self.windows)]
        count = self.windows[first]
        wanted = any(at < first + count and at + length > first for _, at, length in self.held)
        try:
            self.dma.unmap(first * SMALL_PAGE, count * SMALL_PAGE)
        except PinnedError:
            assert wanted
            return
        assert not wanted
        del self.windows[first]

    @rule()
    def disconnect(self) -> None:
        self.dma.unmap_all()
        self.windows.clear()
        self.left += [pin for pin, _, _ in self.held]
        self.held.clear()
        assert all(pin.revoked for pin in self.left)

    @precondition(lambda self: self.left)
    @rule()
    def let_go(self) -> None:
        pin = self.left.pop()
        self.released += pin.pages
        pin.release()

    @invariant()
    def what_is_held_is_counted_and_can_be_reached(self) -> None:
        counters = self.dma.pins.counters
        assert (counters.acquired, counters.released) == (self.acquired, self.released)
        for page in range(self.pages):
            pinned = any(first <= page < first + count for _, first, count in self.held)
            assert self.dma.pins.maybe_pinned(page * SMALL_PAGE) == pinned
        for pin in (*self.left, *(pin for pin, _, _ in self.held)):
            assert all(view[0] == 0 for view in pin.views)


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
