"""Decisions read from bytes, so that whoever makes up the bytes makes the decisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeVar

T = TypeVar("T")

PAGE: Final = 4096

# Where limits and wraps are.
EDGES: Final = (
    *(0, 1, 2, 3, 4, 7, 8, 15, 16, 24, 32, 255, 256, 2048, 2049),
    *(PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 16 * PAGE, 1 << 16, 1 << 20, (1 << 20) + 1),
    *((1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1),
)


class Choices:
    """Reads `data` from its start; after its end every decision is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> bool:
        """Whether there are bytes to decide by."""
        return self._at < len(self._data)

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the end."""
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def byte(self) -> int:
        """A number from 0 to 255."""
        return int.from_bytes(self.bytes(1), "little")

    def below(self, end: int) -> int:
        """A number from 0 to `end` - 1."""
        size = ((end - 1).bit_length() + 7) // 8
        return int.from_bytes(self.bytes(size), "little") % end

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def often(self) -> bool:
        """Seven times in eight."""
        return self.byte() & 7 != 7

    def seldom(self) -> bool:
        """Once in eight times."""
        return self.byte() & 7 == 7

    def number(self, bits: int) -> int:
        """A number that fits in so many bits: mostly one where limits are."""
        if self.often():
            return self.pick(EDGES) & ((1 << bits) - 1)
        return int.from_bytes(self.bytes(bits // 8), "little")
