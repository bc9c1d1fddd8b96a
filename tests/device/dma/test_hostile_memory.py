"""Memory that a client shares and does bad things to: it may hurt itself only."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from device.dma import PAGE_SIZE, DmaWindows
from device.dma._files import MAX_MAPPED
from device.errors import DeviceError

HOLES = """
import os
from device.dma import DmaWindows, PAGE_SIZE
from device.errors import DeviceError
most = int(open("/proc/sys/vm/max_map_count").read())
size = 2 * (most + 100) * PAGE_SIZE
fd = os.memfd_create("guest")
os.ftruncate(fd, size)
dma = DmaWindows()
dma.map(0, size, 3, fd, 0)
os.ftruncate(fd, 0)
served = 0
for at in {order}:
    try:
        dma.read(at, 4)
        served += 1
    except DeviceError:
        pass
assert served == 0
mappings = sum(1 for _ in open("/proc/self/maps"))
assert mappings < 1000, mappings
assert dma.unmap_all() == 1
print("alive")
"""


def outlived(order: str) -> bool:
    """Whether a process outlives accesses, in that order, to memory whose file is gone.

    A process of its own, for the signal that ends it is not to end the tests.
    """
    done = subprocess.run([sys.executable, "-c", HOLES.format(order=order)], capture_output=True, text=True)
    return done.stdout == "alive\n"


def test_a_truncated_file_with_every_second_page_touched_does_not_use_up_the_mappings() -> None:
    assert outlived("range(0, size, 2 * PAGE_SIZE)")


def test_nor_does_one_touched_from_its_end() -> None:
    assert outlived("range(size - PAGE_SIZE, -1, -2 * PAGE_SIZE)")


def test_a_file_that_somebody_has_to_answer_for_is_refused() -> None:
    """Its pages may never come; sysfs is as little a disk as FUSE is, and is always there."""
    fd = os.open("/sys/kernel/uevent_seqnum", os.O_RDONLY)
    try:
        assert os.fstat(fd).st_size >= PAGE_SIZE
        with pytest.raises(DeviceError, match="neither memory nor on a disk") as refusal:
            DmaWindows().map(0, PAGE_SIZE, 1, fd, 0)
        assert refusal.value.errno == errno.EINVAL
    finally:
        os.close(fd)


def test_a_file_on_a_disk_is_not(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(bytes(PAGE_SIZE))
    dma = DmaWindows()
    with path.open("r+b") as file:
        dma.map(0, PAGE_SIZE, 3, file.fileno(), 0)
    dma.write(0, b"there")
    assert path.read_bytes().startswith(b"there")


@pytest.mark.parametrize("parts", [1, 2])
def test_one_page_more_than_all_files_may_have_is_refused(parts: int) -> None:
    """The process has no more room for addresses than all its cards need."""
    dma = DmaWindows()
    fds = [os.memfd_create(f"part {part}") for part in range(parts + 1)]
    try:
        for part, fd in enumerate(fds[:-1]):
            os.ftruncate(fd, MAX_MAPPED // parts)
            dma.map(part * PAGE_SIZE, PAGE_SIZE, 3, fd, 0)
        os.ftruncate(fds[-1], PAGE_SIZE)
        with pytest.raises(DeviceError) as refusal:
            dma.map(parts * PAGE_SIZE, PAGE_SIZE, 3, fds[-1], 0)
        assert refusal.value.errno == errno.ENOMEM
        dma.unmap(0, PAGE_SIZE)
        dma.map(parts * PAGE_SIZE, PAGE_SIZE, 3, fds[-1], 0)
    finally:
        dma.unmap_all()
        for fd in fds:
            os.close(fd)
