"""On-card memory under way: sent ahead while the card runs, and what changed since once it has stopped.

A page that was never written is not sent: memory is zero at power-on, at both ends. What was sent is
remembered as a digest a page, 16 bytes for 4096.
"""

import errno
import mmap
import struct
from collections.abc import Iterator
from hashlib import blake2b

from device.errors import DeviceError
from device.migration.stream import refuse
from device.pci.memory_bar import MemoryBar

PAGE = 4096  # bytes: the unit in which changes are told, whatever the host's pages are
RUN = 64 << 10  # bytes of a section, and looked at together: a reply or two of the usual size

_PLACE = struct.Struct("<QQ")  # BAR index, byte offset

MAX_SECTION = _PLACE.size + RUN

_ZEROS = bytes(PAGE)


class MemorySource:
    """What of `bar` the other end does not have yet."""

    def __init__(self, bar: MemoryBar) -> None:
        self._bar = bar
        self._sent: dict[int, bytes] = {}

    def changed(self) -> Iterator[bytes | None]:
        """One pass over the memory: a section's payload for each run of pages unlike those that were sent,
        and None for each RUN bytes without one. DeviceError(EIO) where a page is poisoned: nobody can tell
        what it held.
        """
        for offset in self._runs():
            block = self._bar.load(offset, min(RUN, self._bar.backing - offset))
            start: int | None = None
            found = False
            for at in range(0, len(block), PAGE):
                if self._news(offset + at, block[at : at + PAGE]):
                    start, found = at if start is None else start, True
                elif start is not None:
                    yield self._payload(offset + start, block[start:at])
                    start = None
            if start is not None:
                yield self._payload(offset + start, block[start:])
            if not found:
                yield None

    def _payload(self, offset: int, data: bytes) -> bytes:
        return _PLACE.pack(self._bar.index, offset) + data

    def _news(self, offset: int, page: bytes) -> bool:
        """Whether the other end has another page there; from now on it has this one."""
        before = self._sent.get(offset)
        if before is None and page == _ZEROS:
            return False
        self._sent[offset] = now = blake2b(page, digest_size=16).digest()
        return now != before

    def _runs(self) -> list[int]:
        """Offsets, multiples of RUN, where pages exist or were sent: holes need not be read."""
        runs = {offset - offset % RUN for offset in self._sent}
        for start, end in self._bar.extents():
            runs.update(range(start - start % RUN, end, RUN))
        return sorted(runs)


class MemoryTarget:
    """What came for `bar`, kept beside it until all has come."""

    def __init__(self, bar: MemoryBar) -> None:
        self._bar = bar
        self._pages: set[int] = set()
        self._staged = mmap.mmap(-1, bar.backing, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def put(self, offset: int, data: bytes) -> None:
        """Keep `data` for byte `offset`; DeviceError(EINVAL) unless these are whole pages of the memory."""
        if offset % PAGE or len(data) % PAGE or not data or offset + len(data) > self._bar.backing:
            raise refuse(f"{len(data)} bytes at {offset:#x} of BAR {self._bar.index}")
        self._staged[offset : offset + len(data)] = data
        self._pages.update(range(offset, offset + len(data), PAGE))

    def check(self) -> None:
        """DeviceError(EIO) if the memory cannot become what came: a page of it is poisoned."""
        if self._bar.poisoned:
            raise DeviceError(errno.EIO, f"memory of BAR {self._bar.index} is lost")

    def apply(self) -> None:
        """Make the memory what came, and zero where nothing did; see `MemoryBar.clear` for mappings."""
        self._bar.clear()
        for offset in sorted(self._pages):
            self._bar.store(offset, self._staged[offset : offset + PAGE])

    def close(self) -> None:
        """Forget what came."""
        self._staged.close()


def split(payload: bytes) -> tuple[int, int, bytes]:
    """BAR index, byte offset and data of a section's payload; DeviceError(EINVAL) if it is too short."""
    if len(payload) < _PLACE.size:
        raise refuse(f"{len(payload)} bytes of memory")
    index, offset = _PLACE.unpack_from(payload)
    return index, offset, payload[_PLACE.size :]
