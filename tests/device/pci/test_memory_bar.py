"""BARs of memory that the host maps, sealed ones: of those that are revoked test_bar_memory tells."""

import errno
import fcntl
import mmap
import os

import pytest

from device.errors import DeviceError
from device.pci.memory_bar import MemoryBar

SIZE = 1 << 20
PAGE = mmap.PAGESIZE
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h


def test_region_accesses_and_mappings_see_the_same_bytes() -> None:
    bar = MemoryBar(2, SIZE)
    with mmap.mmap(bar.fd, SIZE) as host:
        bar.write(PAGE, b"from the wire")
        assert host[PAGE : PAGE + 13] == b"from the wire"
        host[7:11] = b"host"
        assert bar.read(5, 8) == b"\0\0host\0\0"
    bar.close()


@pytest.mark.parametrize(
    ("offset", "count"), [(-1, 1), (SIZE, 1), (SIZE - 3, 4), (0, SIZE + 1), (1 << 63, 4)]
)
def test_an_access_outside_is_refused_with_einval(offset: int, count: int) -> None:
    bar = MemoryBar(2, SIZE)
    with pytest.raises(DeviceError) as refusal:
        bar.read(offset, count)
    assert refusal.value.errno == errno.EINVAL
    with pytest.raises(DeviceError):
        bar.write(offset, bytes(count))
    bar.close()


def test_clearing_is_seen_by_who_has_it_mapped() -> None:
    bar = MemoryBar(2, SIZE)
    with mmap.mmap(bar.fd, SIZE) as host:
        host[:] = b"\xaa" * SIZE
        bar.clear()
        assert host[:] == bytes(SIZE)
    bar.close()


def test_renewed_memory_is_out_of_reach_of_old_mappings() -> None:
    bar = MemoryBar(2, SIZE)
    with mmap.mmap(bar.fd, SIZE) as gone:
        gone[0:6] = b"secret"
        bar.renew()
        assert bar.read(0, 6) == bytes(6)
        gone[0:6] = b"attack"
        assert bar.read(0, 6) == bytes(6)
    bar.close()


def test_sealed_memory_is_mapped_whether_it_is_decoded_or_not() -> None:
    bar = MemoryBar(2, SIZE)
    with mmap.mmap(bar.fd, SIZE) as host:
        for decoded in (True, False):
            bar.decode(decoded)
            host[0:1] = bytes([decoded])
            assert bar.read(0, 1) == bytes([decoded])
    bar.close()


def test_sealed_memory_cannot_be_truncated_but_still_be_cleared() -> None:
    bar = MemoryBar(2, SIZE)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(bar.fd, fcntl.F_GET_SEALS) == seals
    for length in (0, SIZE + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(bar.fd, length)
    bar.write(0, b"x")
    bar.clear()
    assert bar.read(0, 1) == b"\0"
    bar.close()


def test_nobody_can_seal_sealed_memory_against_being_cleared() -> None:
    bar = MemoryBar(2, SIZE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(bar.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    bar.write(0, b"x")
    bar.clear()
    assert bar.read(0, 1) == b"\0"
    bar.close()


def test_flags_that_a_client_sets_on_the_file_do_not_move_writes_to_its_end() -> None:
    bar = MemoryBar(2, SIZE)
    fcntl.fcntl(bar.fd, fcntl.F_SETFL, os.O_APPEND)
    bar.write(PAGE, b"here")
    assert bar.read(PAGE, 4) == b"here"
    bar.close()


def test_reading_memory_that_was_never_written_takes_none() -> None:
    bar = MemoryBar(2, SIZE)
    assert bar.read(0, SIZE) == bytes(SIZE)
    assert os.fstat(bar.fd).st_blocks == 0
    bar.close()


def test_a_bar_smaller_than_a_page_is_mapped_as_one() -> None:
    bar = MemoryBar(2, 0x100)
    assert bar.mmap_areas == ((0, 0x100),)
    with mmap.mmap(bar.fd, PAGE) as host:
        host[0xFF:0x101] = b"ab"
        assert bar.read(0xFF, 1) == b"a"
    with pytest.raises(DeviceError) as refusal:
        bar.read(0xFF, 2)
    assert refusal.value.errno == errno.EINVAL
    bar.close()


def test_beyond_what_backs_it_a_bar_reads_all_ones_and_swallows_writes() -> None:
    bar = MemoryBar(2, SIZE, backing=3 * PAGE)
    assert bar.mmap_areas == ((0, 3 * PAGE),)
    assert os.fstat(bar.fd).st_size == 3 * PAGE
    bar.write(3 * PAGE - 2, b"abcd")
    bar.write(SIZE - 4, bytes(4))
    assert bar.read(3 * PAGE - 3, 5) == b"\0ab\xff\xff"
    assert bar.read(SIZE - 4, 4) == b"\xff" * 4
    assert os.fstat(bar.fd).st_size == 3 * PAGE
    bar.close()


def test_beyond_the_bar_itself_einval_whatever_backs_it() -> None:
    bar = MemoryBar(2, SIZE, backing=PAGE)
    with pytest.raises(DeviceError) as refusal:
        bar.read(SIZE - 2, 4)
    assert refusal.value.errno == errno.EINVAL
    with pytest.raises(DeviceError) as refusal:
        bar.write(SIZE, b"x")
    assert refusal.value.errno == errno.EINVAL
    bar.close()


@pytest.mark.parametrize(
    ("size", "backing"), [(SIZE, 0), (SIZE, -PAGE), (SIZE, PAGE + 1), (SIZE, SIZE + PAGE), (0x100, 0x100)]
)
def test_what_backs_a_bar_are_whole_pages_of_it(size: int, backing: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        MemoryBar(2, size, backing=backing)


def test_sealed_memory_cannot_be_poisoned() -> None:
    bar = MemoryBar(2, SIZE)
    with pytest.raises(DeviceError) as refusal:
        bar.poison(0)
    assert refusal.value.errno == errno.EOPNOTSUPP
    assert bar.read(0, 1) == b"\0"
    bar.close()


def test_closing_gives_the_fd_back() -> None:
    bar = MemoryBar(2, SIZE)
    fd = bar.fd
    bar.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
