"""Which I/O virtual addresses are in use: a host's side of address allocation, so that windows do not
collide.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from sortedcontainers import SortedList

from client._spans import Spans
from client.errors import ClientError

FIRST: Final = 0x1000_0000
"""Below stays free: a device that uses an address of 0 or nearly 0 has read an empty field, and is to
fault.
"""

LAST: Final = 1 << 47
"""What known IOMMUs and guests have."""

HOLES: Final = ((0xFEE0_0000, 0xFEF0_0000),)
"""Not memory on a PC: writes there are interrupts (Intel SDM, message signalled interrupts)."""

TIGHT_FITS: Final = 8
"""Gaps that are hardly large enough, and may not be when aligned, which are looked at before one that surely
is; so an address costs the same however many gaps there are.
"""


class IovaSpace:
    """Hands out ranges of addresses and takes them back. What is handed out without being asked for is the
    beginning of the smallest gap that it fits into, the lowest of several.
    """

    def __init__(self, first: int = FIRST) -> None:
        """What is not asked for lies at `first` or beyond."""
        self._first = first
        self._used: Spans[None] = Spans()
        self._gaps: Spans[None] = Spans()
        self._sizes: SortedList[tuple[int, int]] = SortedList()
        """The gaps by (size, start)."""
        self._open(first, LAST)
        for start, end in HOLES:
            self._use(start, end)

    def take(self, length: int, *, align: int = 4096, at: int | None = None) -> int:
        """The start of a free range, or `at` itself if that is free; raises ClientError if there is none."""
        if length <= 0:
            raise ClientError(f"{length} I/O addresses")
        if at is None:
            at = self._find(length, align)
            if at is None:
                raise ClientError(f"no {length:#x} I/O addresses are free")
        elif self.in_use(at, length):
            raise ClientError(f"I/O addresses {at:#x}+{length:#x} are in use")
        self._use(at, at + length)
        return at

    def in_use(self, start: int, length: int) -> bool:
        """Whether any of these is."""
        return self._used.overlap(start, start + length)

    def give(self, start: int, length: int) -> None:
        """Take back what `take` gave; raises ValueError for anything else."""
        found = self._used.find(start)
        if found is None or found[:2] != (start, start + length):
            raise ValueError(f"{start:#x}+{length:#x} was not handed out")
        self._used.remove(start)
        self._open(max(start, self._first), min(start + length, LAST))

    def _find(self, length: int, align: int) -> int | None:
        tight = islice(self._sizes.irange((length, 0), (length + align - 1, 0)), TIGHT_FITS)
        for candidates in (tight, self._sizes.irange((length + align - 1, 0)), self._all(length)):
            for size, start in candidates:
                aligned = -(-start // align) * align
                if aligned + length <= start + size:
                    return aligned
        return None

    def _all(self, length: int) -> Iterator[tuple[int, int]]:
        """For a space that is nearly full: it is not refused what would fit."""
        return self._sizes.irange((length, 0))

    def _use(self, start: int, end: int) -> None:
        self._used.add(start, end, None)
        for low, high, _ in tuple(self._gaps.overlapping(start, end)):
            self._close(low, high)
            self._open(low, start)
            self._open(end, high)

    def _open(self, start: int, end: int) -> None:
        """These are free from now on, as one with the gaps next to them."""
        if start >= end:
            return
        if (before := self._gaps.find(start - 1)) is not None:
            self._close(before[0], start)
            start = before[0]
        if (after := self._gaps.find(end)) is not None:
            self._close(end, after[1])
            end = after[1]
        self._gaps.add(start, end, None)
        self._sizes.add((end - start, start))

    def _close(self, start: int, end: int) -> None:
        self._gaps.remove(start)
        self._sizes.remove((end - start, start))
