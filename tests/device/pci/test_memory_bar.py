"""BARs of memory that the host maps."""

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
    renewals: list[int] = []
    bar.on_renew = lambda: renewals.append(bar.fd)
    with mmap.mmap(bar.fd, SIZE) as gone:
        gone[0:6] = b"secret"
        bar.renew()
        assert bar.read(0, 6) == bytes(6)
        gone[0:6] = b"attack"
        assert bar.read(0, 6) == bytes(6)
    assert renewals == [bar.fd]
    bar.close()


def test_renewing_does_not_pull_memory_from_under_a_view() -> None:
    bar = MemoryBar(2, SIZE)
    bar.write(0, b"old")
    view = memoryview(bar.memory)
    bar.renew()
    assert bytes(view[0:3]) == b"old"
    view.release()
    bar.close()


def test_by_default_the_memory_can_be_revoked() -> None:
    bar = MemoryBar(2, SIZE)
    os.ftruncate(bar.fd, 0)
    os.ftruncate(bar.fd, SIZE)
    bar.close()


def test_sealed_memory_cannot_be_truncated_but_still_be_cleared() -> None:
    bar = MemoryBar(2, SIZE, sealed=True)
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(bar.fd, fcntl.F_GET_SEALS) == seals
    with pytest.raises(PermissionError):
        os.ftruncate(bar.fd, 0)
    bar.write(0, b"x")
    bar.clear()
    assert bar.read(0, 1) == b"\0"
    bar.close()


def test_nobody_can_seal_sealed_memory_against_being_cleared() -> None:
    bar = MemoryBar(2, SIZE, sealed=True)
    with pytest.raises(PermissionError):
        fcntl.fcntl(bar.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
    bar.write(0, b"x")
    bar.clear()
    assert bar.read(0, 1) == b"\0"
    bar.close()


def test_memory_that_nobody_could_map_is_refused() -> None:
    with pytest.raises(ValueError, match="whole pages"):
        MemoryBar(2, PAGE // 2)


def test_closing_gives_the_fd_back() -> None:
    bar = MemoryBar(2, SIZE)
    fd = bar.fd
    bar.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
