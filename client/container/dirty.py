"""Which pages may have been written to, as far as pins tell (drivers/vfio/vfio_iommu_type1.c,
vfio_iova_dirty_bitmap): pages that are or were pinned, where every device has said that it uses no others;
else everything that is mapped. `client.dirty` has the log that devices themselves keep.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from errno import EINVAL, EOVERFLOW
from itertools import chain

from client._spans import Spans
from client.container._device import Device
from client.container.entry import Entry
from client.container.errors import ContainerError
from client.container.limits import MAX_DIRTY_REPORT, PAGE
from client.container.pinning import Pinning
from client.dirty import DirtyBitmap
from protocol.features import bitmap_size
from protocol.limits import ADDRESS_SPACE


class DirtyTracking:
    """That of one container."""

    def __init__(
        self, entries: Spans[Entry], pinning: Pinning, devices: Callable[[], Collection[Device]]
    ) -> None:
        self._entries = entries
        self._pinning = pinning
        self._devices = devices

    @property
    def pinned_scope(self) -> bool:
        """Whether only pages count that are or were pinned: every attached device pins what it writes to."""
        return all(device.pins_only for device in self._devices())

    def start(self) -> None:
        """Remember from now on; nothing happens if that is so already."""
        self._pinning.tracking = True

    def stop(self) -> None:
        """Forget what was remembered."""
        self._pinning.tracking = False
        for entry in self._entries:
            entry.dirty.clear()

    def report(self, iova: int, size: int) -> DirtyBitmap:
        """The pages of a range that may have been written to since the last report of them, and those that
        are pinned. Raises ContainerError: EINVAL if the range is not made of pages or cuts a mapping, or if
        nothing is remembered; EOVERFLOW if it ends beyond all addresses.
        """
        if size <= 0:
            raise ContainerError(EINVAL, f"a report of {size} bytes")
        if iova < 0 or iova + size > ADDRESS_SPACE:
            raise ContainerError(EOVERFLOW, f"a report of {iova:#x}+{size:#x}")
        if iova % PAGE or size % PAGE or size > MAX_DIRTY_REPORT or not self._pinning.tracking:
            raise ContainerError(EINVAL, f"no report of {iova:#x}+{size:#x}")
        found = [entry for _, _, entry in self._entries.overlapping(iova, iova + size)]
        if found and (found[0].iova < iova or found[-1].end > iova + size):
            raise ContainerError(EINVAL, f"{iova:#x}+{size:#x} cuts a mapping")
        everything = not self.pinned_scope
        bits = bytearray(bitmap_size(size, PAGE))
        for entry in found:
            first = (entry.iova - iova) // PAGE
            if everything:
                _mark_all(bits, first, first + entry.size // PAGE)
            for page in chain(entry.dirty, entry.pins):
                _mark(bits, first + page)
            entry.dirty.clear()
        return DirtyBitmap(iova, size, PAGE, struct.unpack(f"<{len(bits) // 8}Q", bits))


def _mark(bits: bytearray, page: int) -> None:
    bits[page // 8] |= 1 << page % 8


def _mark_all(bits: bytearray, first: int, end: int) -> None:
    """By whole bytes as far as there are any."""
    begin, stop = -(-first // 8), end // 8
    if begin >= stop:
        begin = stop = end
    for page in (*range(first, min(begin * 8, end)), *range(stop * 8, end)):
        _mark(bits, page)
    bits[begin:stop] = b"\xff" * (stop - begin)
