"""Where the bytes of a device's memory lie, for others who want to reach them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PhysVec:
    """`len` bytes at `paddr`: name and shape are those of the kernel's struct phys_vec.

    Between processes there is no physical address but a place in a file, so `paddr` counts the bytes of the
    file behind a region, with the region's own place in it (`RegionDetails.mmap_offset`).
    """

    paddr: int
    len: int
