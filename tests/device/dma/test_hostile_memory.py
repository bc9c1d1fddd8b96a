"""Memory that a client shares and does bad things to: it may hurt itself only."""

import subprocess
import sys

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
        assert dma.read(at, 4) == bytes(4)
        served += 1
    except DeviceError:
        pass
assert served == 1
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
