"""BARs and other regions as a driver sees them: numbers of 1, 2, 4 or 8 bytes at offsets.

What is mapped is accessed by one aligned load or store of the CPU; what is not, or not now, goes by message.
"""

from __future__ import annotations

import sys
from typing import Self

from client.errors import ClientError
from client.mapping import BarMapping, Width
from client.session import Session
from client.trapping import Trapping
from protocol.vfio import RegionIndex


class Bar:
    """A region accessed by the best way for each offset: mapped where the server allows, by message
    elsewhere.

    A context manager. `mapping` is None if nothing of it can be mapped, or if `map` is false. It rests while
    the session's `trapping` says so; whoever subscribed there is told of each access that goes by message.
    Where the mapping has not the device's bytes, because the device's memory is off or the server took it
    away, the server is asked, who may refuse.
    """

    def __init__(self, session: Session, index: int, *, map: bool = True) -> None:  # noqa: A002
        self.session = session
        self.index = index
        self.region = session.regions[index]
        if self.region.size == 0:
            raise ClientError(f"the device has no region {index}")
        # Neither an interrupt's end nor the decoding of memory is the affair of other regions.
        is_bar = index <= RegionIndex.BAR5
        self._trapping = session.trapping if is_bar else Trapping()
        decoding = session.decoding if is_bar else None
        self.mapping = BarMapping(self.region, decoding) if map and self.region.areas else None

    async def read(self, offset: int, width: Width) -> int:
        """A number at an offset; raises ServerError where the device refuses it."""
        mapping = self.mapping
        if mapping is not None and self._trapping.mapped:
            value = mapping.try_read(offset, width)
            if value is not None:
                return value
        number = self._trapping.begin()
        data = await self.session.region_read(self.index, offset, width)
        self._trapping.done(number)
        return int.from_bytes(data, sys.byteorder)

    async def write(self, offset: int, width: Width, value: int) -> None:
        """Write a number and know that the device has it."""
        mapping = self.mapping
        if mapping is not None and self._trapping.mapped and mapping.try_write(offset, width, value):
            return
        number = self._trapping.begin()
        await self.session.region_write(self.index, offset, value.to_bytes(width, sys.byteorder))
        self._trapping.done(number)

    def post(self, offset: int, width: Width, value: int) -> None:
        """Write a number without waiting: a store where mapped, else a posted write."""
        mapping = self.mapping
        if mapping is not None and self._trapping.mapped and mapping.try_write(offset, width, value):
            return
        number = self._trapping.begin()
        self.session.post_write_now(self.index, offset, value.to_bytes(width, sys.byteorder))
        self._trapping.done(number)

    def close(self) -> None:
        """Unmap."""
        if self.mapping is not None:
            self.mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
