"""A region's memory in this process, as the kernel's vfio-pci lends it: faulted in when it is touched, taken
away before the device stops to answer, faulted in again afterwards (drivers/vfio/pci/vfio_pci_core.c).

The address space stays the same all the while, so that views live on: what is taken away reads as ones, as
what a PCI master reads where nobody answers. So does what the server truncates on its own account, and it is
known then that it is lost; nothing that a server does to its memory ends this process.
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, Self

from client._pages import PAGE, Pages
from client.decoding import MemoryDecoding
from client.errors import ClientError
from client.phys_vec import PhysVec
from client.regions import RegionDetails
from protocol.vfio import RegionFlags

Width = Literal[1, 2, 4, 8]

MAX_ALIGN: Final = 1 << 30
"""Bytes that a mapping is aligned to at most: the largest page that an IOMMU or a processor takes at once."""


class MappingState(Enum):
    """What becomes of an access: FAULTABLE brings the memory in first, ZAPPED finds nobody, UNMAPPED is for
    good.
    """

    UNMAPPED = "unmapped"
    FAULTABLE = "faultable"
    MAPPED = "mapped"
    ZAPPED = "zapped"


class OnZapped(Enum):
    """What an access comes to where the device does not answer: all ones and dropped writes, as on a bus, or
    MappingError(EIO), as by message.
    """

    ONES = "ones"
    RAISE = "raise"


class MappingError(ClientError):
    """A region cannot be mapped, or not now; `errno` is what the kernel would say."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno


@dataclass(slots=True)
class _Area:
    """Bytes of the region that may be mapped: `present` while they are faulted in, `dark` while ones are in
    their place.
    """

    start: int
    end: int
    present: bool = False
    dark: bool = False


class BarMapping:
    """The parts of a region that the server lets be mapped, from `offset` for `length` bytes. A context
    manager; `close` unmaps. Offsets are the region's own everywhere.

    With `decoding` (a session's) it follows that: what is mapped is taken away while the device does not
    answer. It begins with nothing mapped. Its address is that of `offset` modulo `align` bytes, by default
    the region's size up to MAX_ALIGN, so that large pages can be used; `skew` bytes beyond it, which makes
    sure that they cannot.

    Raises MappingError: EINVAL for what can never be mapped, ENOMEM for lack of address space. Without
    `decoding` nobody says when a file that is too short will be long enough: EFAULT then.
    """

    def __init__(
        self,
        region: RegionDetails,
        decoding: MemoryDecoding | None = None,
        *,
        offset: int = 0,
        length: int | None = None,
        align: int | None = None,
        skew: int = 0,
        on_zapped: OnZapped = OnZapped.ONES,
    ) -> None:
        self.region = region
        self.offset = offset
        self.length = region.size - offset if length is None else length
        self.writable = RegionFlags.WRITE in region.flags
        self.on_zapped = on_zapped
        self.generation = 0
        """How often it was taken away."""
        self.decoding = decoding
        self._mapped_areas = self._areas = self._mappable()
        if decoding is None:
            for area in self._areas:
                self._check_file(area.start, area.end - area.start)
        if align is None:
            align = max(PAGE, min(1 << (region.size - 1).bit_length(), MAX_ALIGN))
        try:
            self._pages = Pages(_page_align(self.length), align, (offset + skew) % align)
        except OSError as error:
            raise self._cannot(error) from None
        self._changing = threading.RLock()  # a thread faults in before a zap, or finds nobody
        self._following = ExitStack()
        if decoding is not None:
            self._following.enter_context(decoding.followed_by(self))

    def _mappable(self) -> tuple[_Area, ...]:
        """The region's areas within this mapping; those that touch are one."""
        region, end = self.region, self.offset + self.length
        if region.fd < 0 or not region.areas:
            raise MappingError(errno.EINVAL, f"region {region.index} cannot be mapped")
        if self.offset < 0 or self.length <= 0 or end > _page_align(region.size) or self.offset % PAGE:
            raise MappingError(
                errno.EINVAL, f"{self.offset:#x}+{self.length:#x} of region {region.index} cannot be mapped"
            )
        areas: list[_Area] = []
        for start, length in sorted(region.areas):
            if start % PAGE or (region.mmap_offset + start) % PAGE:
                raise MappingError(
                    errno.EINVAL, f"region {region.index}: area {start:#x} does not begin with a page"
                )
            # The kernel maps the last page whole, whatever the BAR has of it.
            limit = _page_align(start + length) if start + length == region.size else start + length
            first, last = max(start, self.offset), min(limit, end)
            if areas and first <= areas[-1].end:
                areas[-1].end = max(areas[-1].end, last)
            elif first < last:
                areas.append(_Area(first, last))
        if not areas:
            raise MappingError(
                errno.EINVAL,
                f"nothing of {self.offset:#x}+{self.length:#x} of region {region.index} is mappable",
            )
        return tuple(areas)

    @property
    def fd(self) -> int:
        """The region's descriptor, which is the session's; -1 once that is closed."""
        return self.region.fd

    @property
    def state(self) -> MappingState:
        """Of all of it; MAPPED as soon as some of it is, whatever the server has taken away since."""
        if not self._areas:
            return MappingState.UNMAPPED
        if not self._answered:
            return MappingState.ZAPPED
        if any(area.present for area in self._areas):
            return MappingState.MAPPED
        return MappingState.FAULTABLE

    @property
    def _answered(self) -> bool:
        return self.decoding is None or self.decoding.enabled

    def covers(self, offset: int, length: int) -> bool:
        """Whether these bytes of the region lie in one area that may be mapped."""
        return self._find(offset, length) is not None

    def lost(self, offset: int, length: int) -> bool:
        """Whether the server has taken any of these bytes away under the mapping, and they were touched
        since: they read as ones until they are faulted in again.
        """
        area = self._area(offset, length)
        return area.present and self._pages.lost(offset - self.offset, length)

    # faulting

    def fault(self, offset: int | None = None, length: int | None = None) -> None:
        """Bring the areas of these bytes in, all by default, unless they are there.

        Raises MappingError: EFAULT while the device does not answer, where its file is too short, for what is
        in no area and after `close`; EINVAL for a file that is mapped in larger pages; ENOMEM, ENOSPC.
        """
        if offset is None and length is None and self._areas:
            for area in self._areas:
                self._fault(area, area.start, area.end - area.start)
            return
        offset = self.offset if offset is None else offset
        length = self.offset + self.length - offset if length is None else length
        self._fault(self._area(offset, length), offset, length)

    def _fault(self, area: _Area, offset: int, length: int) -> None:
        with self._changing:
            if not self._answered:
                raise MappingError(errno.EFAULT, f"the device does not answer at region {self.region.index}")
            self._check_file(offset, length)
            if area.present and not self._pages.lost(offset - self.offset, length):
                return
            at, size = area.start - self.offset, _page_align(area.end - area.start)
            begin = self.region.mmap_offset + area.start
            try:
                self._pages.map(at, self.fd, begin, size, writable=self.writable)
            except OSError as error:
                raise self._cannot(error) from None
            area.present, area.dark = True, False

    def _check_file(self, offset: int, length: int) -> None:
        """The rest of the last page is there even if the file ends before."""
        needed = self.region.mmap_offset + min(offset + length, self.region.size)
        try:
            size = os.fstat(self.fd).st_size
        except OSError as error:
            raise MappingError(errno.EFAULT, f"region {self.region.index}: {error}") from None
        if needed > size:
            raise MappingError(
                errno.EFAULT, f"the descriptor of region {self.region.index} ends at {size:#x}"
            )

    def _cannot(self, error: OSError) -> MappingError:
        return MappingError(
            error.errno or errno.EINVAL, f"region {self.region.index} cannot be mapped: {error}"
        )

    def translate(self, offset: int, length: int) -> tuple[PhysVec, ...]:
        """Where these bytes lie; MappingError(EFAULT) unless all of them are faulted in."""
        area = self._area(offset, length)
        if not area.present or self._pages.lost(offset - self.offset, length):
            raise MappingError(
                errno.EFAULT, f"{offset:#x}+{length:#x} of region {self.region.index} is not faulted in"
            )
        self._check_file(offset, length)
        return (PhysVec(self.region.mmap_offset + offset, length),)

    # access

    def read(self, offset: int, width: Width) -> int:
        """One aligned load, of memory that is faulted in if it must be.

        Raises ClientError if it is not aligned or not in one area, MappingError if it cannot be faulted in.
        """
        area = self._area(offset, width)
        if offset % width:
            raise _not_aligned(offset, width)
        if area.present or self._touch(area, offset, width):
            value = self._pages.load(offset - self.offset, width)
            if value is not None:
                return value
        self._refuse(offset)
        return (1 << 8 * width) - 1

    def write(self, offset: int, width: Width, value: int) -> None:
        """One aligned store; raises as `read` does, and ClientError if the region is read-only."""
        area = self._area(offset, width)
        self._check_store(offset, width)
        at = offset - self.offset
        present = area.present or self._touch(area, offset, width)
        if not (present and self._pages.store(at, width, value)):
            self._refuse(offset)

    def try_read(self, offset: int, width: Width) -> int | None:
        """`read`, but None where the device's own bytes are not to be had here and now: for those who know
        another way. Raises ClientError if it is not aligned.
        """
        area = self._find(offset, width)
        if area is None or not (area.present or self._can_fault(area, offset, width)):
            return None
        if offset % width:
            raise _not_aligned(offset, width)
        return self._pages.load(offset - self.offset, width)

    def try_write(self, offset: int, width: Width, value: int) -> bool:
        """`write`, but False where the device's own bytes are not to be had here and now. Raises ClientError
        if it is not aligned or the region is read-only.
        """
        area = self._find(offset, width)
        if area is None or not (area.present or self._can_fault(area, offset, width)):
            return False
        self._check_store(offset, width)
        return self._pages.store(offset - self.offset, width, value)

    def view(self, offset: int, length: int) -> memoryview:
        """The bytes themselves, for bulk, faulted in; valid until `close`, which fails while views are alive.

        While the memory is zapped or lost it is private: it reads as ones, and what is written stays there.
        Once the device answers again, the next fault brings its bytes back. Raises as `read` does.
        """
        area = self._area(offset, length)
        with self._changing:
            if self._answered:
                self._fault(area, offset, length)
            else:
                self._refuse(offset)
                self._darken(area)
        at = offset - self.offset
        view = memoryview(self._pages)[at : at + length]
        return view if self.writable else view.toreadonly()

    def _touch(self, area: _Area, offset: int, length: int) -> bool:
        """Fault an area in if it is not; False if nobody answers there."""
        if self._answered:
            self._fault(area, offset, length)
        return area.present

    def _can_fault(self, area: _Area, offset: int, length: int) -> bool:
        try:
            return self._touch(area, offset, length)
        except MappingError:
            return False

    def _check_store(self, offset: int, width: int) -> None:
        if offset % width:
            raise _not_aligned(offset, width)
        if not self.writable:
            raise ClientError(f"region {self.region.index} is read-only")

    def _refuse(self, offset: int) -> None:
        if self.on_zapped is OnZapped.RAISE:
            raise MappingError(
                errno.EIO, f"the device does not answer at {offset:#x} of region {self.region.index}"
            )

    def _find(self, offset: int, length: int) -> _Area | None:
        for area in self._areas:
            if area.start <= offset and length <= area.end - offset:
                return area
        return None

    def _area(self, offset: int, length: int) -> _Area:
        area = self._find(offset, length)
        if area is None:
            raise MappingError(
                errno.EFAULT, f"region {self.region.index} is not mapped at {offset:#x}+{length:#x}"
            )
        return area

    # taking away

    def zap(self) -> None:
        """Take the device's memory away, in place: at once, for all views in all threads."""
        self.generation += 1
        with self._changing:
            for area in self._mapped_areas:
                if area.present:
                    self._darken(area)

    def _darken(self, area: _Area) -> None:
        if not area.dark:
            self._pages.zap(area.start - self.offset, _page_align(area.end - area.start))
        area.present, area.dark = False, True

    async def revoke(self) -> None:
        """Nobody uses what is zapped."""

    async def restore(self) -> None:
        """It is faulted in when it is touched."""

    def close(self) -> None:
        """Unmap; raises BufferError while somebody holds a view, and is to be called again then. Nothing is
        accessible by this object any more either way; views are taken away until then as before.
        """
        self._areas = ()
        self._pages.close()
        self._mapped_areas = ()
        self._following.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _not_aligned(offset: int, width: int) -> ClientError:
    return ClientError(f"{width} bytes at {offset:#x}: not aligned")


def _page_align(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE
