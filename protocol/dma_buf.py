"""What travels behind DEVICE_FEATURE for Feature.DMA_BUF: which parts of a BAR are to be shared
(linux/vfio.h, struct vfio_device_feature_dma_buf).

vfio-user's text does not have it. The reply repeats the data of the request and brings along one descriptor,
the BAR's, in which the ranges are found as for mmap: at `RegionInfo.offset` plus their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL

from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_DMA_BUF_RANGES
from protocol.messages import DmaBuf, DmaBufRange


def pack_dma_buf(region_index: int, ranges: Sequence[tuple[int, int]], open_flags: int = 0) -> bytes:
    """Data of DMA_BUF for ranges of (offset, length) in bytes of a region. Raises ValueError for none, for
    more of them than a server takes, and for numbers that do not fit.
    """
    if not 0 < len(ranges) <= MAX_DMA_BUF_RANGES:
        raise ValueError(f"{len(ranges)} ranges to export, not 1 to {MAX_DMA_BUF_RANGES}")
    head = DmaBuf(region_index, open_flags, 0, len(ranges))
    return head.encode() + b"".join(DmaBufRange(*span).encode() for span in ranges)


def parse_dma_buf(data: bytes) -> tuple[DmaBuf, tuple[DmaBufRange, ...]]:
    """Data of DMA_BUF. Raises RemoteProtocolError(EINVAL, not fatal) for flags, for no ranges, and for ranges
    that are too many or not as many as is said. Whether the region has them is the device's to say.
    """
    if len(data) < DmaBuf.size:
        raise _malformed(f"{len(data)} bytes")
    head = DmaBuf.decode(data)
    if head.flags:
        raise _malformed(f"flags {head.flags:#x}")
    if not 0 < head.nr_ranges <= MAX_DMA_BUF_RANGES:
        raise _malformed(f"{head.nr_ranges} ranges, not 1 to {MAX_DMA_BUF_RANGES}")
    if len(data) != DmaBuf.size + head.nr_ranges * DmaBufRange.size:
        raise _malformed(f"{head.nr_ranges} ranges in {len(data)} bytes")
    starts = range(DmaBuf.size, len(data), DmaBufRange.size)
    return head, tuple(DmaBufRange.decode(data, start) for start in starts)


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(EINVAL, f"DMA_BUF with {what}", fatal=False)
