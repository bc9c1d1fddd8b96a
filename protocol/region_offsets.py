"""Regions as one file: region `index` begins at `index << 40`, as at the kernel's device file
(include/linux/vfio_pci_core.h, VFIO_PCI_OFFSET_SHIFT). vfio-user's messages name a region and an offset
instead; this is for software that was written for that file.
"""

from __future__ import annotations

from typing import Final

SHIFT: Final = 40
"""A region has up to 1 TiB."""

INDICES: Final = 1 << 63 - SHIFT
"""How many regions have positions: a file's are signed 64-bit numbers."""


def encode(index: int, offset: int = 0) -> int:
    """The position of a byte of a region; raises ValueError for what has none."""
    if not 0 <= index < INDICES or not 0 <= offset < 1 << SHIFT:
        raise ValueError(f"{offset:#x} of region {index} has no position")
    return index << SHIFT | offset


def decode(position: int) -> tuple[int, int]:
    """The (index, offset) at a position; raises ValueError for what is none."""
    if not 0 <= position < INDICES << SHIFT:
        raise ValueError(f"{position:#x} is not a position in a file")
    return position >> SHIFT, position & (1 << SHIFT) - 1
