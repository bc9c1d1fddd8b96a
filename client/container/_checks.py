"""What the kernel checks before it maps and unmaps, in its order (drivers/vfio/vfio_iommu_type1.c,
vfio_dma_do_map and vfio_dma_do_unmap; drivers/iommu/iommufd/ioas.c and io_pagetable.c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from errno import EEXIST, EINVAL, ENOENT, ENOSPC, EOPNOTSUPP, EOVERFLOW
from typing import Final

from client.container.entry import Entry
from client.container.errors import ContainerError
from client.container.modes import Mode
from client.iova import HOLES
from protocol.limits import ADDRESS_SPACE
from protocol.vfio import DmaMapFlags

# A plain number, because the complement of an IntFlag has none of the bits that no member names.
_KNOWN: Final = int(DmaMapFlags.READ | DmaMapFlags.WRITE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where something is to be mapped: `offset` is that in the file behind it, `page` the bytes that all are
    multiples of; `overlaps` and `full` say what there is already.
    """

    iova: int
    size: int
    offset: int
    flags: DmaMapFlags
    page: int
    overlaps: bool
    full: bool

    @property
    def wraps(self) -> bool:
        """Whether it ends beyond the address space, or begins outside."""
        return self.iova < 0 or max(self.iova, self.offset) + self.size > ADDRESS_SPACE

    @property
    def in_hole(self) -> bool:
        """Whether some of it is no memory on any machine."""
        return any(self.iova < end and start < self.iova + self.size for start, end in HOLES)


def check_place(mode: Mode, place: Place) -> None:
    """Raises ContainerError for what `map` refuses before it looks at the memory."""
    checks = _iommufd(place) if mode is Mode.IOMMUFD else _type1(place)
    for refused, errno, reason in checks:
        if refused:
            raise ContainerError(errno, f"mapping {place.size:#x} bytes at {place.iova:#x}: {reason}")


_Checks = tuple[tuple[bool, int, str], ...]


def _type1(place: Place) -> _Checks:
    flags = int(place.flags)
    return (
        (bool(flags & ~_KNOWN), EINVAL, f"flags {flags:#x}"),
        (place.size <= 0, EINVAL, "nothing"),
        (place.wraps, EOVERFLOW, "beyond the end of all addresses"),
        (not flags, EINVAL, "neither to be read nor to be written"),
        (bool((place.size | place.iova | place.offset) % place.page), EINVAL, "not made of pages"),
        (place.overlaps, EEXIST, "something is mapped there"),
        (place.full, ENOSPC, "as many mappings as there may be"),
        (place.in_hole, EINVAL, "no memory can be there"),
    )


def _iommufd(place: Place) -> _Checks:
    flags = int(place.flags)
    return (
        (bool(flags & ~_KNOWN), EOPNOTSUPP, f"flags {flags:#x}"),
        (max(place.iova, place.size) >= ADDRESS_SPACE - 1, EOVERFLOW, "beyond the end of all addresses"),
        (not flags, EINVAL, "neither to be read nor to be written"),
        (place.size <= 0 or bool(place.size % place.page), EINVAL, "not made of pages"),
        (bool(place.iova % place.page), EINVAL, "not at a page"),
        (place.wraps, EOVERFLOW, "beyond the end of all addresses"),
        (place.in_hole, EINVAL, "no memory can be there"),
        (place.overlaps, EEXIST, "something is mapped there"),
        (bool(place.offset % place.page), EINVAL, "its memory does not begin with a page"),
    )


def check_permissions(flags: DmaMapFlags) -> None:
    """Raises ContainerError(EINVAL) unless they are to read, to write, or both."""
    if not flags or int(flags) & ~_KNOWN:
        raise ContainerError(EINVAL, f"flags {int(flags):#x}")


def check_range(mode: Mode, iova: int, size: int, page: int) -> None:
    """Raises ContainerError for a range that nothing can be unmapped from."""
    what = f"{iova:#x}+{size:#x}"
    if not (0 <= iova < ADDRESS_SPACE and 0 <= size <= ADDRESS_SPACE):
        raise ContainerError(EOVERFLOW, what)
    if mode is not Mode.IOMMUFD and (iova % page or size % page):
        raise ContainerError(EINVAL, f"{what} is not made of pages")
    if not size:
        raise ContainerError(EINVAL, f"{what} is empty")
    if iova + size > ADDRESS_SPACE:
        raise ContainerError(EOVERFLOW, what)


def selected(mode: Mode, iova: int, size: int, found: Sequence[Entry]) -> Sequence[Entry]:
    """Which of the mappings that have something in the range go with it, all of `found` or none.

    TYPE1 takes what begins in the range, whole, and nothing at all if the first begins before it. TYPE1V2
    raises ContainerError(EINVAL) if the range cuts one. IOMMUFD raises ContainerError(ENOENT) for that, and
    if there is none.
    """
    if mode is Mode.TYPE1:
        return found if found and found[0].iova >= iova else ()
    cut = bool(found) and (found[0].iova < iova or found[-1].end > iova + size)
    if mode is Mode.IOMMUFD and (cut or not found):
        raise ContainerError(ENOENT, f"{iova:#x}+{size:#x} is not what was mapped")
    if cut:
        raise ContainerError(EINVAL, f"{iova:#x}+{size:#x} cuts a mapping")
    return found
