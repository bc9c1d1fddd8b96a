"""A BAR given to others, as far as the device has a say: DEVICE_FEATURE with DMA_BUF. What is refused, and in
which order, is the kernel's (drivers/vfio/pci/vfio_pci_dmabuf.c, vfio_pci_core_feature_dma_buf).

The descriptor that goes out is the BAR's own file: nothing is kept of an export, and taking the memory away
is the client's affair, or that of a device that revokes its BARs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from errno import EINVAL, EIO, ENODEV, EOVERFLOW
from mmap import PAGESIZE
from typing import Final

from device.errors import DeviceError
from device.function import PciFunction
from protocol.dma_buf import parse_dma_buf
from protocol.limits import ADDRESS_SPACE
from protocol.messages import DmaBufRange
from protocol.vfio import RegionIndex

__all__ = ["export_bar"]

_MOST_BYTES: Final = 1 << 63
"""All ranges together are less: the kernel has a flag in that bit (DMA_IOVA_USE_SWIOTLB)."""


def export_bar(function: PciFunction, data: bytes) -> int:
    """The file of the BAR that `data` asks for, the function's own. Raises DeviceError: ENODEV without such a
    BAR; EINVAL for ranges that are empty, no whole pages, too much together, outside of the BAR or of what
    can be mapped of it; EOVERFLOW for one that wraps; EIO for memory that is lost for now, but not for all of
    it: a BAR can be exported while memory decoding is off, and none may be there then.
    """
    head, ranges = parse_dma_buf(data)
    regions = function.regions()
    if head.region_index >= RegionIndex.ROM or not regions[head.region_index].size:
        raise DeviceError(ENODEV, f"there is no BAR {head.region_index}")
    region = regions[head.region_index]
    _check_pages(ranges)
    if region.fd is None:
        raise DeviceError(EINVAL, f"BAR {head.region_index} cannot be mapped")
    for one in ranges:
        end = one.offset + one.length
        if end >= ADDRESS_SPACE:
            raise DeviceError(EOVERFLOW, f"a range at {one.offset:#x}+{one.length:#x} wraps")
        if not any(start <= one.offset and end <= start + size for start, size in region.mmap_areas):
            where = f"{one.offset:#x}+{one.length:#x}"
            raise DeviceError(EINVAL, f"BAR {head.region_index} has nothing to be mapped at {where}")
    if 0 < os.fstat(region.fd).st_size < max(one.offset + one.length for one in ranges):
        raise DeviceError(EIO, f"memory of BAR {head.region_index} is lost")
    return region.fd


def _check_pages(ranges: Sequence[DmaBufRange]) -> None:
    for one in ranges:
        if not one.length or one.offset % PAGESIZE or one.length % PAGESIZE:
            raise DeviceError(EINVAL, f"a range at {one.offset:#x}+{one.length:#x} is not whole pages")
    if sum(one.length for one in ranges) >= _MOST_BYTES:
        raise DeviceError(EINVAL, "the ranges are too long together")
