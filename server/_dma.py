"""DMA windows and the log of what was written to them: DMA_MAP, DMA_UNMAP, and the features of logging."""

from __future__ import annotations

from dataclasses import replace
from errno import EINVAL, ENOSPC, EOPNOTSUPP
from itertools import pairwise
from typing import Final

from device.dma import MAX_REPORT
from device.errors import DeviceError
from device.function import PciFunction
from protocol import Request
from protocol.features import parse_logging_start
from protocol.messages import Bitmap, DmaLoggingControl, DmaLoggingReport, DmaMap, DmaUnmap
from protocol.vfio import DmaMapFlags, DmaUnmapFlags
from server._answer import Answer, Terms

__all__ = [
    "SMALLEST_PAGE",
    "dma_map",
    "dma_unmap",
    "map_window",
    "report_logging",
    "start_logging",
    "stop_logging",
    "unmap_span",
]

# Plain numbers, because the complement of an IntFlag has none of the bits that no member names.
_PROTECTION: Final = int(DmaMapFlags.READ | DmaMapFlags.WRITE)
_UNMAP_ALL: Final = int(DmaUnmapFlags.ALL)
_BITMAP: Final = int(DmaUnmapFlags.GET_DIRTY_BITMAP)

# A dirty bitmap has no smaller pages, as the kernel's (drivers/vfio/vfio_main.c, SZ_4K).
SMALLEST_PAGE: Final = 4096


def dma_map(function: PciFunction, request: Request, body: DmaMap, terms: Terms) -> Answer:
    """DMA_MAP, see `map_window`."""
    fd = request.fds[0] if request.fds else None
    map_window(function, terms, int(body.flags), body.offset, body.address, body.length, fd)
    return Answer()


def map_window(
    function: PciFunction,
    terms: Terms,
    flags: int,
    offset: int,
    address: int,
    length: int,
    fd: int | None,
) -> None:
    """Map a window; one that came with a descriptor is reached through that, others by message."""
    if flags & ~_PROTECTION:
        # The other bits choose ways to reach the memory that this server does not know: to ignore them
        # would be to map something else than was meant.
        raise DeviceError(EINVAL, f"DMA_MAP flags {flags:#x}")
    if len(function.dma) >= terms.windows:
        raise DeviceError(ENOSPC, f"{terms.windows} DMA windows, as many as were agreed on")
    with function.gate:
        function.dma.map(address, length, flags, fd, 0 if fd is None else offset)


def dma_unmap(function: PciFunction, request: Request, body: DmaUnmap, terms: Terms) -> Answer:
    """Take windows away, those inside a span or all: when this returns the device uses none of them.

    PinnedError, and nothing has changed, while some of their memory is held.
    """
    flags = int(body.flags)
    if flags & ~(_UNMAP_ALL | _BITMAP):
        raise DeviceError(EOPNOTSUPP, f"DMA_UNMAP flags {flags:#x}")
    if flags & _UNMAP_ALL:
        if body.address or body.length:
            raise DeviceError(EINVAL, "DMA_UNMAP of everything with an address or a size")
        with function.gate:
            function.dma.pins.check()
            function.dma.unmap_all()
    elif flags & _BITMAP:
        return _unmap_with_bitmap(function, body, Bitmap.decode(request.data))
    else:
        unmap_span(function, body.address, body.length)
    return Answer(replace(body, argsz=DmaUnmap.size))


def unmap_span(function: PciFunction, address: int, length: int) -> None:
    """Take the windows inside the span away; PinnedError as `dma_unmap`."""
    with function.gate:
        function.dma.unmap(address, length)


def _unmap_with_bitmap(function: PciFunction, body: DmaUnmap, bitmap: Bitmap) -> Answer:
    with function.gate:
        # Whatever the log refuses is refused before the window is gone.
        smaller = bitmap.page_size < SMALLEST_PAGE
        if smaller or not function.dma.logging or (body.address | body.length) & (bitmap.page_size - 1):
            raise DeviceError(EINVAL, f"no writes are logged to whole pages of {bitmap.page_size:#x} bytes")
        if body.length // bitmap.page_size > 8 * MAX_REPORT:
            raise DeviceError(EINVAL, f"{8 * MAX_REPORT} pages at most are reported at once")
        function.dma.unmap(body.address, body.length)
        bits = function.dma.log_report(body.address, body.length, bitmap.page_size)
    data = bitmap.encode() + bits.ljust(bitmap.length, b"\0")
    return Answer(replace(body, argsz=DmaUnmap.size + len(data)), data)


def start_logging(function: PciFunction, data: bytes) -> bytes:
    """Log writes from now on; the page size that was chosen is in the reply.

    The ranges are checked as the kernel does, but all memory is logged: there is nothing to win by less.
    """
    asked, ranges = parse_logging_start(data)
    if asked.page_size.bit_count() != 1:
        raise DeviceError(EINVAL, f"pages of {asked.page_size:#x} bytes cannot be logged")
    for part in ranges:
        if (part.iova | part.length) & (asked.page_size - 1):
            raise DeviceError(EINVAL, f"{part.pretty()} is not whole pages of {asked.page_size:#x} bytes")
    for part, following in pairwise(sorted(ranges, key=lambda part: part.iova)):
        if part.iova + part.length > following.iova:
            raise DeviceError(EINVAL, f"{part.pretty()} and {following.pretty()} overlap")
    chosen = max(asked.page_size, SMALLEST_PAGE)
    with function.gate:
        if function.dma.logging:
            raise DeviceError(EINVAL, "writes are logged already")
        function.dma.log_start(chosen)
    return replace(asked, page_size=chosen).encode() + data[DmaLoggingControl.size :]


def stop_logging(function: PciFunction, data: bytes) -> bytes:
    """Log no more, and forget what was logged; nothing happens if nothing is."""
    with function.gate:
        function.dma.log_stop()
    return data


def report_logging(function: PciFunction, data: bytes) -> bytes:
    """The pages that were written to since they were last reported; the log checks what is asked."""
    asked = DmaLoggingReport.decode(data)
    with function.gate:
        bits = function.dma.log_report(asked.iova, asked.length, asked.page_size)
    return asked.encode() + bits
