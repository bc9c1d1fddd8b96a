from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client._pages import MAX_ONES_MAPS, MAX_SIZE, ONES_CHUNK, PAGE, SLOTS, Pages, chunk_for, place
from tests.client.children import DEVICES_GUARD, died_of_sigbus, lived, ran
from tests.descriptors import open_fds, settled_fds

POWERS = st.integers(12, 30).map(lambda bits: 1 << bits)


@contextmanager
def file_of(size: int) -> Iterator[int]:
    """A memfd of so many bytes, each page beginning with its number."""
    fd = os.memfd_create("device")
    os.truncate(fd, size)
    for page in range(min(size // PAGE, 16)):
        os.pwrite(fd, bytes([page + 1]), page * PAGE)
    yield fd
    os.close(fd)


@contextmanager
def pages_of(size: int, align: int = PAGE, offset: int = 0) -> Iterator[Pages]:
    pages = Pages(size, align, offset)
    yield pages
    pages.close()


def maps() -> int:
    """How many maps this process has."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def vm_size() -> int:
    """Bytes of address space that this process uses."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


# where address space is reserved


@given(st.integers(1, 1 << 40).map(lambda page: page * PAGE), POWERS, st.data())
def test_a_place_is_the_offset_modulo_the_alignment(base: int, align: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, align // PAGE - 1)) * PAGE
    found = place(base, align, offset)
    assert found % align == offset % align


@given(st.integers(1, 1 << 40).map(lambda page: page * PAGE), POWERS, st.data())
def test_a_place_is_the_first_one_within_what_is_reserved(base: int, align: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, align // PAGE - 1)) * PAGE
    found = place(base, align, offset)
    assert base <= found < base + align, "so that what is reserved has `size` bytes from there"


@given(st.integers(1, 64), st.integers(12, 24), st.data())
def test_pages_begin_there_and_nothing_else_stays_reserved(size: int, bits: int, data: st.DataObject) -> None:
    align = 1 << bits
    offset = data.draw(st.integers(0, align // PAGE - 1)) * PAGE
    before = vm_size()
    with pages_of(size * PAGE, align, offset) as pages:
        assert pages.address % align == offset
        assert vm_size() - before == size * PAGE
    assert vm_size() == before


def test_address_space_is_given_back_whatever_was_mapped_and_zapped_in_it() -> None:
    with file_of(0x10000) as fd:

        def use() -> None:
            with pages_of(0x40000, 1 << 20, 0x3000) as pages:
                for _ in range(3):
                    pages.map(0x10000, fd, 0, 0x8000, writable=True)
                    pages.map(0x20000, fd, 0, 0x8000, writable=True)
                    pages.zap(0x10000, 0x2000)

        use()
        before = vm_size(), settled_fds()
        for _ in range(100):
            use()
        assert (vm_size(), open_fds()) == before


def test_pages_that_are_dropped_give_it_back_too() -> None:
    before = vm_size(), settled_fds()
    Pages(1 << 24).zap(0, 1 << 24)
    assert (vm_size(), open_fds()) == before


@pytest.mark.parametrize(
    ("size", "align", "offset"),
    [(0, PAGE, 0), (1, PAGE, 0), (PAGE, PAGE + 1, 0), (PAGE, 1, 0), (PAGE, PAGE, PAGE), (PAGE, 1 << 20, 12)],
)
def test_what_are_no_pages_is_refused(size: int, align: int, offset: int) -> None:
    with pytest.raises(OSError, match=r".") as refusal:
        Pages(size, align, offset)
    assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize("size", [MAX_SIZE + PAGE, 1 << 62, 1 << 64])
def test_more_address_space_than_a_process_has_is_refused(size: int) -> None:
    with pytest.raises(OSError, match="memory") as refusal:
        Pages(size)
    assert refusal.value.errno == errno.ENOMEM


# mapping and zapping


def test_what_is_mapped_is_the_files_and_what_is_zapped_is_ones_at_the_same_place() -> None:
    with file_of(0x4000) as fd, pages_of(0x4000) as pages, memoryview(pages) as view:
        pages.map(0, fd, 0, 0x4000, writable=True)
        assert (view[0], view[0x3000]) == (1, 4)
        pages.zap(0, 0x4000)
        assert bytes(view) == b"\xff" * 0x4000
        view[:4] = b"gone"
        assert os.pread(fd, 4, 0) == b"\1\0\0\0", "what is written to zapped pages never reaches the file"
        pages.map(0, fd, 0, 0x4000, writable=True)
        assert bytes(view[:4]) == b"\1\0\0\0"
        view[4:8] = b"here"
        assert os.pread(fd, 4, 4) == b"here"
        pages.zap(0, 0x4000)
        assert bytes(view) == b"\xff" * 0x4000, "and is forgotten"


def test_part_of_what_is_mapped_may_be_zapped() -> None:
    with file_of(0x4000) as fd, pages_of(0x4000) as pages, memoryview(pages) as view:
        pages.map(0, fd, 0, 0x4000, writable=True)
        pages.zap(0x1000, 0x1000)
        assert [view[at] for at in range(0, 0x4000, PAGE)] == [1, 0xFF, 3, 4]


def test_numbers_are_loaded_and_stored_whole() -> None:
    with file_of(0x1000) as fd, pages_of(0x1000) as pages:
        pages.map(0, fd, 0, 0x1000, writable=True)
        for width in (1, 2, 4, 8):
            value = 0x8182_8384_8586_8788 & (1 << 8 * width) - 1
            assert pages.store(0xFF8, width, value)
            assert pages.load(0xFF8, width) == value
            assert os.pread(fd, width, 0xFF8) == value.to_bytes(width, "little")
            with pytest.raises(OverflowError):
                pages.store(0xFF8, width, 1 << 8 * width)


@pytest.mark.parametrize(
    ("at", "width"), [(-1, 1), (0x1000, 1), (0xFFD, 4), (1 << 62, 8), (0, 3), (0, 0), (0, 16)]
)
def test_a_number_outside_is_refused(at: int, width: int) -> None:
    with pages_of(0x1000) as pages:
        pages.zap(0, 0x1000)
        with pytest.raises(ValueError, match="bytes at"):
            pages.load(at, width)
        with pytest.raises(ValueError, match="bytes at"):
            pages.store(at, width, 0)


@pytest.mark.parametrize(
    ("at", "length"), [(0, 0), (0, 1), (1, PAGE), (-PAGE, PAGE), (0, 0x5000), (0x4000, PAGE)]
)
def test_what_are_not_whole_pages_of_these_is_neither_mapped_nor_zapped(at: int, length: int) -> None:
    with file_of(0x8000) as fd, pages_of(0x4000) as pages:
        with pytest.raises(OSError, match="pages of") as refusal:
            pages.map(at, fd, 0, length, writable=True)
        assert refusal.value.errno == errno.EINVAL
        with pytest.raises(OSError, match="pages of"):
            pages.zap(at, length)


def test_a_range_is_mapped_again_whole_or_not_at_all() -> None:
    with file_of(0x4000) as fd, pages_of(0x4000) as pages:
        pages.map(0x1000, fd, 0, 0x2000, writable=True)
        pages.map(0x1000, fd, 0x1000, 0x2000, writable=True)
        assert pages.load(0x1000, 1) == 2
        for at, length in ((0x1000, 0x1000), (0, 0x2000), (0x2000, 0x2000), (0, 0x4000)):
            with pytest.raises(OSError, match="in other pieces"):
                pages.map(at, fd, 0, length, writable=True)
        pages.map(0, fd, 0, 0x1000, writable=True)


def test_a_file_of_larger_pages_is_mapped_in_those_or_not_at_all() -> None:
    """The kernel would round a shorter mapping up, over whatever is next to it."""
    fd = os.memfd_create("huge", os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.truncate(fd, 2 << 20)
        with pages_of(PAGE) as pages:
            with pytest.raises(OSError, match="in pages of 0x200000") as refusal:
                pages.map(0, fd, 0, PAGE, writable=True)
            assert refusal.value.errno == errno.EINVAL
            assert "memfd:huge" not in Path("/proc/self/maps").read_text()
    finally:
        os.close(fd)


def test_what_mmap_refuses_is_told() -> None:
    with pages_of(PAGE) as pages, pytest.raises(OSError, match="descriptor"):
        pages.map(0, -1, 0, PAGE, writable=True)


def test_what_was_lost_and_cannot_be_mapped_again_stays_lost() -> None:
    with file_of(2 * PAGE) as fd, pages_of(2 * PAGE) as pages:
        readable = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        pages.map(0, fd, 0, 2 * PAGE, writable=True)
        os.truncate(fd, PAGE)
        assert (pages.load(0, 1), pages.load(PAGE, 1)) == (1, None)
        os.truncate(fd, 2 * PAGE)
        with pytest.raises(PermissionError):
            pages.map(0, readable, 0, 2 * PAGE, writable=True)
        os.close(readable)
        assert (pages.load(0, 1), pages.load(PAGE, 1)) == (None, None)
        assert not pages.store(PAGE, 1, 7), "it went nowhere"
        assert bytes(memoryview(pages)) == b"\xff" * (2 * PAGE)
        pages.map(0, fd, 0, 2 * PAGE, writable=True)
        assert pages.load(0, 1) == 1


def test_closing_waits_for_views() -> None:
    pages = Pages(PAGE)
    view = memoryview(pages)[1:2]
    with pytest.raises(BufferError, match="view"):
        pages.close()
    view.release()
    pages.close()
    pages.close()
    assert pages.address == 0
    with pytest.raises(BufferError, match="closed"):
        memoryview(pages)
    with pytest.raises(OSError, match="closed"):
        pages.zap(0, PAGE)
    with pytest.raises(ValueError, match="bytes at"):
        pages.load(0, 1)


def test_there_are_so_many_ranges_and_not_one_more() -> None:
    with file_of(PAGE) as fd, pages_of((SLOTS + 1) * PAGE) as pages:

        def fill() -> None:
            for page in range(SLOTS + 1):
                pages.map(page * PAGE, fd, 0, PAGE, writable=True)

        with pytest.raises(OSError, match="mapped already") as refusal:
            fill()
        assert refusal.value.errno == errno.ENOSPC
    with file_of(PAGE) as fd, pages_of(PAGE) as pages:
        pages.map(0, fd, 0, PAGE, writable=True)


# large BARs


@given(st.integers(1, MAX_SIZE // PAGE))
def test_zapped_memory_consists_of_a_bounded_number_of_maps(pages: int) -> None:
    size = pages * PAGE
    chunk = chunk_for(size)
    assert chunk % PAGE == 0
    assert -(-size // chunk) <= MAX_ONES_MAPS
    assert chunk <= max(ONES_CHUNK, 2 * size // MAX_ONES_MAPS, PAGE), (
        "and the file of ones is no larger for it"
    )


def test_64_gib_are_zapped_with_few_maps_and_little_memory() -> None:
    size = 64 << 30
    with file_of(size) as fd, pages_of(size, 1 << 30) as pages:
        pages.map(0, fd, 0, size, writable=True)
        before = maps()
        pages.zap(0, size)
        assert maps() - before <= MAX_ONES_MAPS
        assert [pages.load(at, 8) for at in (0, 5 << 30, size - 8)] == [(1 << 64) - 1] * 3
        pages.map(0, fd, 0, size, writable=True)
        assert maps() - before <= 3, "they are gone; some may be the allocator's"
        assert (pages.load(0, 1), pages.load(size - 1, 1)) == (1, 0)
    assert chunk_for(size) == 16 << 20
    assert chunk_for(MAX_SIZE) == 256 << 20, "whatever a server says that it has"


def test_pages_of_the_same_size_share_their_file_of_ones() -> None:
    with pages_of(1 << 20) as one, pages_of(1 << 20) as other:
        before = len(settled_fds())
        one.zap(0, 1 << 20)
        other.zap(0, 1 << 20)
        assert len(open_fds()) - before <= 1


USE_UP_ALL_MAPS = """
import mmap
fd = file_of(8 << 20)
pages = Pages(8 << 20)
pages.map(0, fd, 0, 8 << 20, writable=True)
others = []
try:
    while True:
        others.append(mmap.mmap(-1, PAGE))  # shared: never one with its neighbour
except OSError as error:
    assert error.errno == 12
assert len(others) > 1000
"""


def test_a_process_without_maps_left_still_takes_memory_away() -> None:
    lived(
        USE_UP_ALL_MAPS
        + """
pages.zap(0, 8 << 20)
assert {pages.load(at, 1) for at in range(0, 8 << 20, PAGE)} <= {0, 0xFF}
assert pages.store(0, 1, 7)
assert os.pread(fd, 1, 0) == b"D"
"""
    )


def test_a_process_without_maps_left_still_outlives_what_the_server_takes_away() -> None:
    lived(
        USE_UP_ALL_MAPS
        + """
os.truncate(fd, 0x1000)
assert pages.load(0x5000, 1) is None
assert pages.load(0x2000, 1) is None
assert pages.load(0, 1) is None, "all of it, with one map"
"""
    )


# threads


def test_a_thread_that_touches_memory_finds_ones_or_the_devices_bytes_and_no_end() -> None:
    size, mine = 0x4000, 0x5A5A_5A5A_5A5A_5A5A
    with file_of(size) as fd, pages_of(size, 1 << 20) as pages:
        os.pwrite(fd, b"\x5a" * size, 0)
        pages.map(0, fd, 0, size, writable=True)
        stop, seen = threading.Event(), set[int]()

        def touch() -> None:
            copy = (ctypes.c_uint64 * (size // 8))()
            while not stop.is_set():
                ctypes.memmove(copy, pages.address, size)  # without the interpreter's lock
                seen.update(copy)

        threads = [threading.Thread(target=touch) for _ in range(2)]
        for thread in threads:
            thread.start()
        switched = 0
        while switched < 2000 or len(seen) < 2:
            pages.zap(0, size)
            pages.map(0, fd, 0, size, writable=True)
            switched += 1
        stop.set()
        for thread in threads:
            thread.join()
        assert seen == {mine, (1 << 64) - 1}


def test_threads_outlive_a_server_that_truncates_while_they_touch() -> None:
    lived(
        """
        size = 0x8000
        fd = file_of(size)
        pages = Pages(size)
        pages.map(0, fd, 0, size, writable=True)
        stop, seen = threading.Event(), set()
        def touch():
            copy = (ctypes.c_uint8 * size)()
            while not stop.is_set():
                ctypes.memmove(copy, pages.address, size)
                seen.update(copy)
        threads = [threading.Thread(target=touch) for _ in range(3)]
        [thread.start() for thread in threads]
        rounds = 0
        while rounds < 1000 or 0xFF not in seen:
            os.truncate(fd, 0x2000)
            pages.load(0x7000, 1)
            os.truncate(fd, size)
            pages.map(0, fd, 0, size, writable=True)
            rounds += 1
        stop.set()
        [thread.join() for thread in threads]
        assert seen <= {0, ord("D"), 0xFF}, seen
        """
    )


# what a server takes away by itself


def test_a_raw_mapping_of_what_the_server_took_away_ends_the_process() -> None:
    """What the guard is for."""
    died_of_sigbus(
        """
        import mmap
        fd = file_of(0x2000)
        memory = mmap.mmap(fd, 0x2000)
        assert memory[0x1000] == ord("D")
        os.truncate(fd, 0x1000)
        memory[0x1000]
        """
    )


def test_what_the_server_took_away_reads_as_ones_and_is_known_to_be_lost() -> None:
    with file_of(0x4000) as fd, pages_of(0x4000) as pages, memoryview(pages) as view:
        pages.map(0, fd, 0, 0x4000, writable=True)
        os.truncate(fd, 0x1000)
        assert not pages.lost(0, 0x4000), "nobody has looked"
        assert view[0x2004] == 0xFF
        assert pages.lost(0x2000, 1)
        assert pages.lost(0, 0x4000)
        assert not pages.lost(0, 0x2000)
        assert pages.load(0x3000, 4) is None
        assert not pages.store(0x2000, 4, 7)
        assert pages.load(0x1000, 4) is None, "what is before it, once it is looked at"
        assert pages.lost(0x1000, 1)
        assert pages.load(0, 4) == 1, "what is still there"
        assert pages.store(8, 4, 9)
        os.truncate(fd, 0x4000)
        os.pwrite(fd, b"again", 0x2000)
        pages.map(0, fd, 0, 0x4000, writable=True)
        assert not pages.lost(0, 0x4000)
        assert bytes(view[0x2000:0x2005]) == b"again"


def test_one_range_lost_leaves_the_others() -> None:
    with file_of(0x2000) as fd, file_of(0x2000) as other, pages_of(0x4000) as pages:
        pages.map(0, fd, 0, 0x2000, writable=True)
        pages.map(0x2000, other, 0, 0x2000, writable=True)
        os.truncate(fd, 0)
        assert pages.load(0, 1) is None
        assert pages.load(0x2000, 1) == 1
        assert not pages.lost(0x2000, 0x2000)


def test_the_whole_of_a_large_mapping_is_lost_with_few_maps() -> None:
    size = 16 << 30
    with file_of(size) as fd, pages_of(size) as pages:
        pages.map(0, fd, 0, size, writable=True)
        before = maps()
        os.truncate(fd, 0)
        for at in (size - PAGE, 3 << 30, 0):
            assert pages.load(at, 1) is None
        assert maps() - before <= MAX_ONES_MAPS + 3


def test_a_read_only_mapping_is_lost_alike() -> None:
    with file_of(0x1000) as fd, pages_of(0x1000) as pages:
        pages.map(0, fd, 0, 0x1000, writable=False)
        os.truncate(fd, 0)
        assert pages.load(0, 4) is None


# others who handle SIGBUS

ELSEWHERE = """
import mmap
elsewhere = mmap.mmap(file := file_of(0x1000), 0x1000)
os.truncate(file, 0)
elsewhere[0]
"""

OURS = """
fd = file_of(0x2000)
pages = Pages(0x2000)
pages.map(0, fd, 0, 0x2000, writable=True)
"""

LOSE_OURS = """
os.truncate(fd, 0x1000)
assert pages.load(0x1000, 1) is None
assert pages.load(0, 1) == ord("D")
"""


def test_a_fault_elsewhere_still_ends_the_process() -> None:
    died_of_sigbus(OURS + LOSE_OURS + ELSEWHERE)


LOSE_THEIRS = """
from device.errors import DeviceError
os.truncate(theirs, 0)
try:
    assert dma.read(0, 4) == bytes(4)
except DeviceError:
    pass  # it may be told: what counts here is that there is somebody to tell
"""


@pytest.mark.parametrize("order", ["ours first", "the device's first"])
def test_a_device_in_the_same_process_guards_its_own(order: str) -> None:
    install = OURS + DEVICES_GUARD if order == "ours first" else DEVICES_GUARD + OURS
    lived(install + LOSE_OURS + LOSE_THEIRS)
    lived(install + LOSE_THEIRS + LOSE_OURS)
    died_of_sigbus(install + LOSE_OURS + LOSE_THEIRS + ELSEWHERE)


FAULTHANDLER = "import faulthandler\nfaulthandler.enable()\n"


def test_pythons_fault_handler_tells_of_a_fault_elsewhere_and_of_no_other() -> None:
    assert "Bus error" not in lived(FAULTHANDLER + OURS + LOSE_OURS)
    assert "Bus error" in died_of_sigbus(FAULTHANDLER + OURS + LOSE_OURS + ELSEWHERE)


def test_one_that_was_enabled_later_tells_of_ours_once_and_passes_it_on() -> None:
    assert lived(OURS + FAULTHANDLER + LOSE_OURS).count("Bus error") == 1
    assert "Bus error" in died_of_sigbus(OURS + FAULTHANDLER + ELSEWHERE)


@pytest.mark.parametrize(
    "install", [DEVICES_GUARD + OURS + FAULTHANDLER, OURS + DEVICES_GUARD + FAULTHANDLER]
)
def test_all_three_live_together(install: str) -> None:
    lived(install.replace(FAULTHANDLER, "") + LOSE_OURS + LOSE_THEIRS)
    died_of_sigbus(install + ELSEWHERE)


def test_a_signal_that_somebody_sends_ends_the_process_as_ever() -> None:
    died_of_sigbus(OURS + "import signal\nos.kill(os.getpid(), signal.SIGBUS)\n")


def test_a_signal_that_was_ignored_before_is_ignored_as_ever_but_no_fault() -> None:
    ignoring = "import signal\nsignal.signal(signal.SIGBUS, signal.SIG_IGN)\n"
    lived(ignoring + OURS + LOSE_OURS + "os.kill(os.getpid(), signal.SIGBUS)\n")
    died_of_sigbus(ignoring + OURS + ELSEWHERE)


def test_a_child_of_a_process_that_has_mappings_is_guarded_as_well() -> None:
    lived(
        OURS
        + """
child = os.fork()
if child == 0:
    try:
        os.truncate(fd, 0x1000)
        assert pages.load(0x1000, 1) is None
    except BaseException:
        os._exit(1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert not pages.lost(0, 0x2000), "what the child found is its own"
"""
    )


def test_a_child_that_fails_otherwise_is_told_apart() -> None:
    assert ran("raise SystemExit(3)")[0] == 3
