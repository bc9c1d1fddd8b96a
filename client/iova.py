"""Which I/O virtual addresses are in use: a host's side of address allocation, so that windows do not
collide.
"""

from __future__ import annotations

from bisect import insort
from typing import Final

from client.errors import ClientError

FIRST: Final = 0x1000_0000
"""Below stays free: a device that uses an address of 0 or nearly 0 has read an empty field, and is to
fault.
"""

LAST: Final = 1 << 47
"""What known IOMMUs and guests have."""

HOLES: Final = ((0xFEE0_0000, 0xFEF0_0000),)
"""Not memory on a PC: writes there are interrupts (Intel SDM, message signalled interrupts)."""


class IovaSpace:
    """Hands out ranges of addresses and takes them back."""

    def __init__(self) -> None:
        self._used: list[tuple[int, int]] = list(HOLES)

    def take(self, length: int, *, align: int = 4096, at: int | None = None) -> int:
        """The start of a free range, or `at` itself if that is free; raises ClientError if there is none."""
        if at is not None:
            if any(at < end and start < at + length for start, end in self._used):
                raise ClientError(f"I/O addresses {at:#x}+{length:#x} are in use")
            insort(self._used, (at, at + length))
            return at
        start = -(-FIRST // align) * align
        for used, end in self._used:
            if start + length <= used:
                break
            start = max(start, -(-end // align) * align)
        if start + length > LAST:
            raise ClientError(f"no {length:#x} I/O addresses are free")
        insort(self._used, (start, start + length))
        return start

    def give(self, start: int, length: int) -> None:
        """Take back what `take` gave."""
        self._used.remove((start, start + length))
