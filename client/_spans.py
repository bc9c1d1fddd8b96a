"""Things that each have a range of addresses to themselves, in the order of their addresses.

Every operation costs as much as the logarithm of how many there are, whatever the order they come in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from sortedcontainers import SortedDict

T = TypeVar("T")

Span = tuple[int, int, T]
"""The first address, the first one after it, and whose it is."""


class Spans(Generic[T]):
    """No two ranges overlap, and none is empty."""

    def __init__(self) -> None:
        self._at: SortedDict[int, tuple[int, T]] = SortedDict()

    def __len__(self) -> int:
        return len(self._at)

    def __iter__(self) -> Iterator[T]:
        """In the order of their addresses, as they are now."""
        return iter([value for _, value in self._at.values()])

    def get(self, start: int) -> T | None:
        """What begins exactly there."""
        found = self._at.get(start)
        return None if found is None else found[1]

    def find(self, address: int) -> Span[T] | None:
        """What has this address."""
        for start in self._at.irange(maximum=address, reverse=True):
            end, value = self._at[start]
            return (start, end, value) if address < end else None
        return None

    def overlapping(self, start: int, end: int) -> Iterator[Span[T]]:
        """What has an address from `start` up to `end`, in order; the table is to stay as it is meanwhile."""
        first = self.find(start)
        for at in self._at.irange(start if first is None else first[0], end, inclusive=(True, False)):
            yield at, *self._at[at]

    def overlap(self, start: int, end: int) -> bool:
        """Whether there is any such."""
        return next(self.overlapping(start, end), None) is not None

    def add(self, start: int, end: int, value: T) -> None:
        """Raises ValueError if the range is empty or overlaps another."""
        if start >= end or self.overlap(start, end):
            raise ValueError(f"{start:#x} up to {end:#x}")
        self._at[start] = end, value

    def remove(self, start: int) -> T:
        """Forget what begins there; raises KeyError if nothing does."""
        return self._at.pop(start)[1]
