"""The files behind BARs that only tests have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from client.regions import RegionDetails
from protocol.vfio import RegionFlags

RWM: Final = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP


@contextmanager
def memory(size: int) -> Iterator[int]:
    """A memfd of so many bytes."""
    fd = os.memfd_create("bar")
    os.truncate(fd, size)
    yield fd
    os.close(fd)


def region_of(fd: int, size: int, *areas: tuple[int, int], offset: int = 0) -> RegionDetails:
    """A region that may be mapped, all of it by default."""
    return RegionDetails(2, size, RWM, offset, areas or ((0, size),), (), fd)
