"""Where bytes of a BAR are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PhysVec:
    """`len` bytes at byte `paddr` of a BAR's file, where its region's `mmap_offset` counts: the only physical
    address that there is between processes (include/linux/types.h, struct phys_vec).
    """

    paddr: int
    len: int
