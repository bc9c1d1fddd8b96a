"""A device as the one file that vfio-pci makes of it: every region at its own place, for software that was
written for that file, like the kernel's selftests.
"""

from __future__ import annotations

import errno
from typing import Final

from client._pages import PAGE
from client.errors import ClientError
from client.mapping import BarMapping, MappingError
from client.regions import RegionDetails
from client.session import Session
from protocol.region_offsets import decode
from protocol.vfio import RegionIndex

NOT_MAPPABLE: Final = RegionIndex.ROM
"""The first region that no one may map (drivers/vfio/pci/vfio_pci_core.c, vfio_pci_core_mmap)."""


class PositionError(ClientError):
    """There is nothing at that position; `errno` is EINVAL, what the kernel says."""

    errno: Final = errno.EINVAL


class DeviceFile:
    """A session's. Positions are those of `protocol.region_offsets`. Reads and writes go by message."""

    def __init__(self, session: Session) -> None:
        self.session = session

    async def pread(self, count: int, position: int) -> bytes:
        """Up to `count` bytes, fewer at the end of a region. Raises PositionError where there is no region or
        beyond its end, and as `Session.region_read` does.
        """
        region, offset = self._place(position)
        return await self.session.region_read(region.index, offset, min(count, region.size - offset))

    async def pwrite(self, data: bytes | bytearray | memoryview, position: int) -> int:
        """Write up to the end of the region; how many bytes those were. Raises as `pread` does."""
        region, offset = self._place(position)
        part = bytes(data)[: region.size - offset]
        await self.session.region_write(region.index, offset, part)
        return len(part)

    def mmap(self, length: int, position: int) -> BarMapping:
        """Map part of a BAR, which may end with the BAR's last page even if the BAR does not. Nothing is
        faulted in yet.

        Raises MappingError(EINVAL) for a region that is none, no BAR or cannot be mapped, past its last page,
        and for a position within a page.
        """
        try:
            region, offset = self._place(position)
        except PositionError as error:
            raise MappingError(error.errno, str(error)) from None
        if region.index >= NOT_MAPPABLE or position % PAGE:
            raise MappingError(errno.EINVAL, f"nothing can be mapped at {position:#x}")
        return BarMapping(region, self.session.decoding, offset=offset, length=length)

    def _place(self, position: int) -> tuple[RegionDetails, int]:
        try:
            index, offset = decode(position)
        except ValueError as error:
            raise PositionError(str(error)) from None
        regions = self.session.regions
        if index >= len(regions) or offset >= regions[index].size:
            raise PositionError(f"the device has nothing at {offset:#x} of region {index}")
        return regions[index], offset
