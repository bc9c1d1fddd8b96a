"""The memory behind a BAR, in a file that clients map."""

import errno
import fcntl
import os
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

from device.errors import DeviceError
from device.pci._memfd import Memfd, copy


class BarMemory(Protocol):
    """`size` bytes, whole pages; what a client does to `fd` harms nobody but that client."""

    fd: int

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes, wherever they are; all ones where the client has shortened the file."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data`, wherever it belongs."""

    def extents(self) -> Iterator[tuple[int, int]]:
        """Where memory is, as (start, end) of whole pages; all else is zero."""

    def show(self, length: int) -> None:
        """Let clients reach the first `length` bytes through their mappings and no others. Nothing is changed
        by that. DeviceError(EIO) if memory was short: mappings reach less than `length` then.
        """

    def clear(self) -> None:
        """All zero."""

    def close(self) -> None:
        """Give it back."""


class Sealed:
    """Memory of which nobody can take anything away: clients reach all of it, always."""

    def __init__(self, name: str, size: int) -> None:
        self._file = Memfd(name, size, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.fd = _shared(self._file)
        self.read = self._file.read
        self.write = self._file.write

    def extents(self) -> Iterator[tuple[int, int]]:
        """See `BarMemory`."""
        return self._file.extents(0, self._file.size)

    def show(self, length: int) -> None:
        """It is shown as it is."""

    def clear(self) -> None:
        """In place: whoever has it mapped sees zeros."""
        self._file.punch(0, self._file.size)

    def close(self) -> None:
        """Old mappings go on seeing what they saw."""
        _close(self.fd, self._file)


class Revocable:
    """Memory that mappings reach up to where it is shown, and nowhere at first. What is not shown lies aside,
    in a file that nobody else has.

    Clients can cut and grow the file that they have. So what lies there beyond what is shown is never
    believed, and is gone before more is shown.
    """

    def __init__(self, name: str, size: int) -> None:
        self._aside = Memfd(f"{name} aside", size)
        try:
            self._file = Memfd(name, size)
            self.fd = _shared(self._file)
        except BaseException:
            self._aside.close()
            raise
        self._shown = 0
        self._file.cut(0)

    def read(self, offset: int, count: int) -> bytes:
        """See `BarMemory`."""
        if offset + count <= self._shown:
            return self._file.read(offset, count)
        there = max(min(self._shown - offset, count), 0)
        before = self._file.read(offset, there) if there else b""
        return before + self._aside.read(offset + there, count - there)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See `BarMemory`."""
        there = max(min(self._shown - offset, len(data)), 0)
        view = memoryview(data)
        if there:
            self._file.write(offset, view[:there])
        if there < len(data):
            self._aside.write(offset + there, view[there:])

    def extents(self) -> Iterator[tuple[int, int]]:
        """See `BarMemory`."""
        return chain(self._file.extents(0, self._shown), self._aside.extents(self._shown, self._aside.size))

    def show(self, length: int) -> None:
        """Move what is in between, a block at a time, so that no block is there twice for long."""
        try:
            if length < self._shown:
                self._take_back(length)
            elif length > self._shown:
                self._give(length)
        except OSError as error:
            raise DeviceError(errno.EIO, f"on-card memory cannot be moved: {error.strerror}") from error

    def _take_back(self, length: int) -> None:
        """From the end, for a file can only be cut there. Mappings go, even if there is no room aside."""
        try:
            for start, end in reversed(self._file.blocks(length, self._shown)):
                copy(self._file, self._aside, start, end)
                self._file.cut(start)
        finally:
            self._shown = length
            self._file.cut(length)

    def _give(self, length: int) -> None:
        """Each block is either here or there, whatever comes in between."""
        self._file.cut(self._shown)
        try:
            for start, end in self._aside.blocks(self._shown, length):
                copy(self._aside, self._file, start, end)
                self._aside.punch(start, end)
                self._shown = end
            self._file.cut(length)
            self._shown = length
        except BaseException:
            self._file.cut(self._shown)
            raise

    def clear(self) -> None:
        """Nothing is shown any more, so that no store of a client can come after it."""
        self._shown = 0
        self._file.cut(0)
        self._aside.punch(0, self._aside.size)

    def forget(self, start: int, end: int) -> None:
        """Zero from `start` to `end`, whole pages that are not shown."""
        self._aside.punch(start, end)

    def close(self) -> None:
        """Mappings that are left fault from now on."""
        self._file.cut(0)
        _close(self.fd, self._file)
        self._aside.close()


def _shared(file: Memfd) -> int:
    try:
        return file.share()
    except BaseException:
        file.close()
        raise


def _close(fd: int, file: Memfd) -> None:
    os.close(fd)
    file.close()
