"""BARs and other regions as a driver sees them: numbers of 1, 2, 4 or 8 bytes at offsets.

A mapped access is one aligned load or store of the CPU (a cast memoryview indexed once); what is not mapped
goes by message. Memory that the server takes away under a mapping kills this process with SIGBUS, as it
would a driver of real hardware: map what you trust.
"""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import dataclass
from typing import Final, Literal, Self

from client.errors import ClientError
from client.regions import RegionDetails
from client.session import Session
from client.trapping import Trapping
from protocol.vfio import RegionFlags, RegionIndex

Width = Literal[1, 2, 4, 8]

CODES: Final[dict[int, Literal["B", "H", "I", "Q"]]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
PAGE: Final = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class _Area:
    region: int
    start: int
    end: int
    memory: mmap.mmap
    casts: dict[int, memoryview]

    def load(self, offset: int, width: Width) -> int:
        if offset % width:
            raise ClientError(f"{width} bytes at {offset:#x}: not aligned")
        value: int = self.casts[width][(offset - self.start) // width]
        return value

    def store(self, offset: int, width: Width, value: int) -> None:
        if offset % width:
            raise ClientError(f"{width} bytes at {offset:#x}: not aligned")
        try:
            self.casts[width][(offset - self.start) // width] = value
        except TypeError:
            raise ClientError(f"region {self.region} is read-only") from None


class BarMapping:
    """The parts of a region that the server lets be mapped, mapped. A context manager; `close` unmaps.

    Raises ClientError if the region cannot be mapped at all, or if its descriptor is shorter than the
    server says, which would be a SIGBUS later.
    """

    def __init__(self, region: RegionDetails) -> None:
        if region.fd < 0 or not region.areas:
            raise ClientError(f"region {region.index} cannot be mapped")
        self.region = region
        self.writable = RegionFlags.WRITE in region.flags
        self._areas: list[_Area] = []
        self._closing: list[_Area] = []
        size = os.fstat(region.fd).st_size
        try:
            for start, length in sorted(region.areas):
                if region.mmap_offset + start + length > size:
                    raise ClientError(f"the descriptor of region {region.index} ends at {size:#x}")
                self._areas.append(self._map(start, length))
        except BaseException:
            self.close()
            raise

    def _map(self, start: int, length: int) -> _Area:
        at = self.region.mmap_offset + start
        if start % PAGE or at % PAGE:
            raise ClientError(f"region {self.region.index}: area {start:#x} does not begin with a page")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if self.writable else 0)
        try:
            memory = mmap.mmap(self.region.fd, length, mmap.MAP_SHARED, prot, offset=at)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter now than a moment ago
            raise ClientError(f"region {self.region.index} cannot be mapped: {error}") from None
        view = memoryview(memory)
        casts = {
            width: view[: length - length % width].cast("B").cast(code)
            for width, code in CODES.items()
            if width > 1
        }
        return _Area(self.region.index, start, start + length, memory, {1: view, **casts})

    def covers(self, offset: int, length: int) -> bool:
        """Whether these bytes of the region lie in one mapped area."""
        return self._find(offset, length) is not None

    def _find(self, offset: int, length: int) -> _Area | None:
        for area in self._areas:
            if area.start <= offset and length <= area.end - offset:
                return area
        return None

    def _area(self, offset: int, length: int) -> _Area:
        area = self._find(offset, length)
        if area is None:
            raise ClientError(f"region {self.region.index} is not mapped at {offset:#x}+{length:#x}")
        return area

    def read(self, offset: int, width: Width) -> int:
        """One aligned load; raises ClientError if it is not aligned or not mapped."""
        return self._area(offset, width).load(offset, width)

    def write(self, offset: int, width: Width, value: int) -> None:
        """One aligned store; raises ClientError if it is not aligned, not mapped or the region is
        read-only.
        """
        self._area(offset, width).store(offset, width, value)

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, for bulk; valid until `close`, which fails while views are alive."""
        area = self._area(offset, length)
        return area.casts[1][offset - area.start : offset - area.start + length]

    def close(self) -> None:
        """Unmap; raises BufferError while somebody holds a view, and is to be called again then. Nothing is
        accessible any more either way.
        """
        self._closing += self._areas
        self._areas.clear()
        while self._closing:
            area = self._closing[-1]
            for view in area.casts.values():
                view.release()
            area.memory.close()
            self._closing.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Bar:
    """A region accessed by the best way for each offset: mapped where the server allows, by message
    elsewhere.

    A context manager. `mapping` is None if nothing of it can be mapped, or if `map` is false. It rests while
    the session's `trapping` says so; whoever subscribed there is told of each access that goes by message.
    """

    def __init__(self, session: Session, index: int, *, map: bool = True) -> None:  # noqa: A002
        self.session = session
        self.index = index
        self.region = session.regions[index]
        if self.region.size == 0:
            raise ClientError(f"the device has no region {index}")
        self.mapping = BarMapping(self.region) if map and self.region.areas else None
        # An interrupt is ended by accesses to BARs: those to other regions are nobody's affair.
        self._trapping = session.trapping if index <= RegionIndex.BAR5 else Trapping()

    def _mapped(self, offset: int, width: Width) -> _Area | None:
        if self.mapping is None or not self._trapping.mapped:
            return None
        return self.mapping._find(offset, width)

    async def read(self, offset: int, width: Width) -> int:
        """A number at an offset; raises ServerError where the device refuses it."""
        if (area := self._mapped(offset, width)) is not None:
            return area.load(offset, width)
        number = self._trapping.begin()
        data = await self.session.region_read(self.index, offset, width)
        self._trapping.done(number)
        return int.from_bytes(data, sys.byteorder)

    async def write(self, offset: int, width: Width, value: int) -> None:
        """Write a number and know that the device has it."""
        if (area := self._mapped(offset, width)) is not None:
            area.store(offset, width, value)
            return
        number = self._trapping.begin()
        await self.session.region_write(self.index, offset, value.to_bytes(width, sys.byteorder))
        self._trapping.done(number)

    def post(self, offset: int, width: Width, value: int) -> None:
        """Write a number without waiting: a store where mapped, else a posted write."""
        if (area := self._mapped(offset, width)) is not None:
            area.store(offset, width, value)
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
