"""Base address registers with registers behind them."""

import errno
import logging
from bisect import bisect_right
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Protocol

from device.errors import DeviceError

log = logging.getLogger(__name__)

LAST_BAR = 5
MIN_SIZE = 16  # bits 3..0 of a memory BAR are its type (PCI Local Bus 3.0, 6.2.5.1)
MAX_SIZE_32 = 1 << 31  # the highest bit that a 32-bit BAR can leave writable
MAX_SIZE_64 = 1 << 63

UNMODELLED_OFFSETS = (
    256  # offsets remembered per BAR: a driver that sweeps the BAR must not fill the server's memory
)

_NATURAL = {1: 0, 2: 1, 4: 3, 8: 7}  # access size -> the offset bits that must be clear


Data = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Accesses:
    """What answers accesses to a region, and refuses them with DeviceError: read(offset, count) and
    write(offset, data).
    """

    read: Callable[[int, int], bytes]
    write: Callable[[int, Data], None]


class BarKind(Enum):
    """What a BAR's low bits say; the value is the field `memory type`."""

    MEM32 = 0b00
    MEM64 = 0b10


class Handler(Protocol):
    """A sub-range of a register BAR.

    Accesses are naturally aligned, of 1, 2, 4 or 8 bytes; `offset` counts from the start of the sub-range.
    """

    def read(self, offset: int, count: int) -> int:
        """The value of `count` bytes, below 1 << 8 * count."""

    def write(self, offset: int, count: int, value: int) -> None:
        """Take `count` bytes."""


def check_bar(index: int, size: int, kind: BarKind) -> None:
    """ValueError unless a BAR of that kind and size can exist at `index`."""
    limit = MAX_SIZE_64 if kind is BarKind.MEM64 else MAX_SIZE_32
    last = LAST_BAR - 1 if kind is BarKind.MEM64 else LAST_BAR
    if not 0 <= index <= last:
        raise ValueError(f"there is no {kind.name} BAR {index}")
    if size & (size - 1) or not MIN_SIZE <= size <= limit:
        raise ValueError(
            f"BAR {index} of {size:#x} bytes: {kind.name} takes a power of two from {MIN_SIZE} to {limit:#x}"
        )


# start, end, read, write, gated, claimed
_Range = tuple[int, int, Callable[[int, int], int], Callable[[int, int, int], None], bool, bool]


class Bar:
    """A BAR of registers: sub-ranges claimed by handlers, nothing mappable.

    An access of 1, 2, 4 or 8 bytes, naturally aligned and inside one sub-range, reaches its handler as it is;
    any other is cut into the largest such pieces, in ascending order. Handlers run inside the gate, unless
    claimed with `gated=False`.
    """

    fd: None = None

    def __init__(
        self, index: int, size: int, *, kind: BarKind = BarKind.MEM32, prefetchable: bool = False
    ) -> None:
        check_bar(index, size, kind)
        self.index = index
        self.size = size
        self.kind = kind
        self.prefetchable = prefetchable
        self.gate: AbstractContextManager[object] = nullcontext()
        self._claims: list[tuple[int, int, Handler, bool, str]] = []
        self._unmodelled: dict[int, int] = {}
        self._starts: list[int] = []
        self._ranges: list[_Range] = []
        self._lay_out()

    @property
    def unmodelled(self) -> Mapping[int, int]:
        """Accesses that no handler claimed: offset -> how many, for the first UNMODELLED_OFFSETS offsets."""
        return MappingProxyType(self._unmodelled)

    def claim(self, offset: int, size: int, handler: Handler, *, gated: bool = True, name: str = "") -> None:
        """Give `size` bytes at `offset` to `handler`.

        ValueError if they overlap a claim, leave the BAR or are not dword-aligned.

        `gated=False` is for doorbells: the handler runs without the gate and must not touch what workers
        touch.
        """
        if size <= 0 or offset < 0 or offset + size > self.size or offset & 3:
            raise ValueError(
                f"BAR {self.index}: {size:#x} bytes at {offset:#x} do not fit into {self.size:#x}"
            )
        for other, other_size, *_, other_name in self._claims:
            if offset < other + other_size and other < offset + size:
                raise ValueError(f"BAR {self.index}: {name or offset} overlaps {other_name or other}")
        self._claims.append((offset, size, handler, gated, name))
        self._lay_out()

    def _lay_out(self) -> None:
        """Cover the whole BAR with ranges in ascending order, so that a look-up always finds one."""
        ranges: list[_Range] = []
        position = 0

        def leave_open(end: int) -> None:
            if position < end:
                ranges.append((position, end, *self._unclaimed(position), False, False))

        for offset, size, handler, gated, _name in sorted(self._claims, key=lambda claim: claim[0]):
            leave_open(offset)
            ranges.append((offset, offset + size, handler.read, handler.write, gated, True))
            position = offset + size
        leave_open(self.size)
        self._ranges = ranges
        self._starts = [start for start, *_ in ranges]

    def _unclaimed(self, start: int) -> tuple[Callable[[int, int], int], Callable[[int, int, int], None]]:
        """The two accesses of bytes between sub-ranges: they read zero, swallow writes, and are counted."""

        def read(offset: int, count: int) -> int:
            self._note_unmodelled(start + offset, count, "read")
            return 0

        def write(offset: int, count: int, value: int) -> None:
            self._note_unmodelled(start + offset, count, "write")

        return read, write

    def _note_unmodelled(self, offset: int, count: int, what: str) -> None:
        """Count an access to bytes that mean nothing; the first at each offset is logged."""
        seen = self._unmodelled.get(offset, 0)
        if seen or len(self._unmodelled) < UNMODELLED_OFFSETS:
            self._unmodelled[offset] = seen + 1
            if not seen:
                log.warning(
                    "BAR %d: %s of %d bytes at %#x, where there is nothing", self.index, what, count, offset
                )

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes; DeviceError(EINVAL) outside the BAR."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise self._outside(offset, count)
        if count in _NATURAL and not offset & _NATURAL[count]:
            start, end, read, _, gated, _ = self._ranges[bisect_right(self._starts, offset) - 1]
            if offset + count <= end:
                if gated:
                    with self.gate:
                        return read(offset - start, count).to_bytes(count, "little")
                return read(offset - start, count).to_bytes(count, "little")
        with self.gate:
            return self._read_pieces(offset, count)

    def write(self, offset: int, data: Data) -> None:
        """Write `data`; DeviceError(EINVAL) outside the BAR."""
        count = len(data)
        if offset < 0 or offset + count > self.size:
            raise self._outside(offset, count)
        if count in _NATURAL and not offset & _NATURAL[count]:
            start, end, _, write, gated, _ = self._ranges[bisect_right(self._starts, offset) - 1]
            if offset + count <= end:
                if gated:
                    with self.gate:
                        write(offset - start, count, int.from_bytes(data, "little"))
                else:
                    write(offset - start, count, int.from_bytes(data, "little"))
                return
        with self.gate:
            self._write_pieces(offset, memoryview(data))

    def _read_pieces(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        position, end = offset, offset + count
        while position < end:
            start, stop, read, _, _, claimed = self._ranges[bisect_right(self._starts, position) - 1]
            size = _piece(position, min(stop, end)) if claimed else min(stop, end) - position
            at = position - offset
            data[at : at + size] = read(position - start, size).to_bytes(size, "little")
            position += size
        return bytes(data)

    def _write_pieces(self, offset: int, data: memoryview) -> None:
        position, end = offset, offset + len(data)
        while position < end:
            start, stop, _, write, _, claimed = self._ranges[bisect_right(self._starts, position) - 1]
            size = _piece(position, min(stop, end)) if claimed else min(stop, end) - position
            at = position - offset
            write(position - start, size, int.from_bytes(data[at : at + size], "little"))
            position += size

    def _outside(self, offset: int, count: int) -> DeviceError:
        return DeviceError(
            errno.EINVAL, f"BAR {self.index}: {count} bytes at {offset:#x} lie outside {self.size:#x} bytes"
        )

    def close(self) -> None:
        """Nothing to give back."""


def _piece(position: int, end: int) -> int:
    """The largest naturally aligned access size that starts at `position` and does not pass `end`."""
    size = 8
    while position & (size - 1) or position + size > end:
        size >>= 1
    return size
