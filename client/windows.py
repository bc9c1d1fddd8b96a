"""Which I/O virtual addresses the server was given, and what lies behind them here.

A server that has no mapping of a window, or makes none, reaches it by DMA_READ and DMA_WRITE; this is where
those are checked. An access may cross from one window into the next, as it may cross pages behind an IOMMU;
one that is refused has moved nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from errno import EACCES, EFAULT

from client._spans import Spans
from client.errors import ClientError
from protocol.vfio import DmaMapFlags


class WindowError(ClientError):
    """An access that the windows do not allow; `errno` is what the server is told.

    EFAULT: not all of it is mapped, or it lies in a window whose bytes are not known here. EACCES: it is
    mapped, but not for this direction.
    """

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(reason)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Window:
    """`size` bytes at `iova`. `view` is None where this process has no mapping of them."""

    iova: int
    size: int
    flags: DmaMapFlags
    view: memoryview | None = None

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.iova + self.size


class Windows:
    """The windows of one session, those whose DMA_MAP is under way included."""

    def __init__(self) -> None:
        self._windows: Spans[Window] = Spans()
        self._written: set[int] | None = None
        self.log_page_size = 1
        """Bytes of a page of the log, see `log_writes`."""

    def __len__(self) -> int:
        return len(self._windows)

    def __iter__(self) -> Iterator[Window]:
        """In the order of their addresses."""
        return iter(self._windows)

    def __contains__(self, place: tuple[int, int]) -> bool:
        """Whether there is a window with exactly this address and size."""
        iova, size = place
        window = self._windows.get(iova)
        return window is not None and window.size == size

    def add(self, window: Window) -> None:
        """Raises ClientError if it is empty, overlaps another, or its view cannot be what it says."""
        if window.size <= 0:
            raise ClientError(f"a DMA window of {window.size} bytes")
        view = window.view
        if view is not None and (view.nbytes != window.size or view.format != "B" or not view.c_contiguous):
            raise ClientError(f"the view of a DMA window of {window.size} bytes is not as many bytes")
        if view is not None and view.readonly and DmaMapFlags.WRITE in window.flags:
            raise ClientError("a DMA window that the device may write has a read-only view")
        try:
            self._windows.add(window.iova, window.end, window)
        except ValueError:
            raise ClientError(f"DMA window {window.iova:#x}+{window.size:#x} overlaps another") from None

    def remove(self, iova: int, size: int) -> None:
        """Forget a window; nothing happens if there is none exactly there."""
        if (iova, size) in self:
            self._windows.remove(iova)

    def read(self, address: int, count: int) -> bytes:
        """What the device gets to read there; raises WindowError."""
        parts = self._resolve(address, count, DmaMapFlags.READ)
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Store what the device writes there; raises WindowError, and stores nothing then."""
        at = 0
        for part in self._resolve(address, len(data), DmaMapFlags.WRITE):
            part[:] = data[at : at + len(part)]
            at += len(part)
        if self._written is not None and data:
            first, last = address // self.log_page_size, (address + len(data) - 1) // self.log_page_size
            self._written.update(range(first, last + 1))

    def _resolve(self, address: int, count: int, wanted: DmaMapFlags) -> list[memoryview]:
        parts = []
        position, end = address, address + count
        while position < end:
            found = self._windows.find(position)
            if found is None:
                raise WindowError(EFAULT, f"{address:#x}+{count:#x} is not mapped at {position:#x}")
            window = found[2]
            if wanted not in window.flags:
                raise WindowError(EACCES, f"{address:#x}+{count:#x} is mapped without {wanted.name}")
            if window.view is None:
                raise WindowError(EFAULT, f"{address:#x}+{count:#x} lies in memory that is not mapped here")
            stop = min(end, window.end)
            try:
                parts.append(window.view[position - window.iova : stop - window.iova])
            except ValueError:  # the owner released it
                raise WindowError(EFAULT, f"the memory at {position:#x} is gone") from None
            position = stop
        return parts

    # writes by message are this side's to log: the device only sees a message leave

    def log_writes(self, page_size: int) -> None:
        """Remember from now on which pages of so many bytes `write` touches."""
        self._written, self.log_page_size = set(), page_size

    @property
    def logging(self) -> bool:
        """Whether it is remembered which pages are written."""
        return self._written is not None

    def stop_log(self) -> None:
        """Forget them and remember no more."""
        self._written = None

    def take_written(self, start: int, end: int) -> Iterable[int]:
        """The starts of the pages between two addresses that were written; they are forgotten."""
        if self._written is None:
            return ()
        size = self.log_page_size
        found = {page for page in self._written if start <= page * size + size - 1 and page * size < end}
        self._written -= found
        return sorted(page * size for page in found)
