"""Which addresses a client has mapped."""

from __future__ import annotations

from bisect import bisect_left

__all__ = ["Windows"]


class Windows:
    """Windows that do not overlap, by address and size in bytes."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._sizes: dict[int, int] = {}

    def add(self, start: int, size: int) -> None:
        """Note a window; one that starts where another does takes its place."""
        if start not in self._sizes:
            self._starts.insert(bisect_left(self._starts, start), start)
        self._sizes[start] = size

    def discard(self, start: int) -> None:
        """Forget the window that starts there, if there is one."""
        if self._sizes.pop(start, None) is not None:
            del self._starts[bisect_left(self._starts, start)]

    def overlap(self, start: int, size: int) -> bool:
        """Whether some of these bytes are in a window."""
        following = bisect_left(self._starts, start)
        if following < len(self._starts) and self._starts[following] < start + size:
            return True
        before = self._starts[following - 1] if following else None
        return before is not None and before + self._sizes[before] > start
