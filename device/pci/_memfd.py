"""Bytes of a file in memory that a stranger may have, too.

Nothing here touches a mapping. Whoever shares the file can shorten it between a look and a touch, which would
be SIGBUS; reading and writing the file itself then only does less.
"""

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack

PAGE = mmap.PAGESIZE
BLOCK = 1 << 20  # bytes copied at a time: few calls, and little memory


class Memfd:
    """`size` bytes, whole pages, all zero at first; nobody can put on other seals than `seals`.

    Its memory is what was written: holes stay holes, whoever reads them. Raises OSError if the system has no
    more memory or descriptors to give.
    """

    def __init__(self, name: str, size: int, seals: int = 0) -> None:
        self.size = size
        with ExitStack() as undo:
            self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, self._fd)
            os.ftruncate(self._fd, size)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
            self._never_touched = mmap.mmap(self._fd, size)  # it is there for MADV_REMOVE
            undo.pop_all()

    def share(self) -> int:
        """A descriptor to give away, the caller's to close.

        It is an open file of its own: flags belong to open files, and O_APPEND on ours would send every write
        to the end.
        """
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes; all ones where the file has been shortened."""
        return os.pread(self._fd, count, offset).ljust(count, b"\xff")

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data`, but for what lies where the file has been shortened."""
        room = os.lseek(self._fd, 0, os.SEEK_END) - offset
        self.put(offset, memoryview(data)[: max(room, 0)])

    def put(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data`. Where that makes the file longer, mappings do not reach a byte before it is
        there.
        """
        left = memoryview(data)
        while left:
            done = os.pwrite(self._fd, left, offset)
            left, offset = left[done:], offset + done

    def punch(self, start: int, end: int) -> None:
        """Zero from `start` to `end`, whole pages, in place: mappings stay, and see zeros."""
        if start < end:
            self._never_touched.madvise(mmap.MADV_REMOVE, start, end - start)

    def cut(self, length: int) -> None:
        """Shorten the file to `length` bytes, from where on no mapping reaches it; or let it be so long, with
        zeros at the end. PermissionError if seals forbid it.
        """
        os.ftruncate(self._fd, length)

    def extents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Where in these whole pages memory is: (start, end) in ascending order, whatever others do meanwhile
        to the file.
        """
        while (data := self._data(start, end)) is not None:
            yield data, (start := self._hole(data, end))

    def blocks(self, start: int, end: int) -> list[tuple[int, int]]:
        """The same in pieces of at most BLOCK bytes, with holes in them."""
        found = []
        while (data := self._data(start, end)) is not None:
            start = min(data - data % BLOCK + BLOCK, end)
            found.append((data, start))
        return found

    def _data(self, start: int, end: int) -> int | None:
        if start >= end:
            return None
        try:
            found = os.lseek(self._fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left, or nothing at all
            return None
        return found if found < end else None

    def _hole(self, data: int, end: int) -> int:
        try:
            found = os.lseek(self._fd, data, os.SEEK_HOLE)
        except OSError:  # the file has been shortened since
            found = data
        # The page may have been taken away since, or the file's end be in the middle of one.
        return min(max(-(-found // PAGE) * PAGE, data + PAGE), end)

    def close(self) -> None:
        """Give it back. Others keep what they have of it."""
        self._never_touched.close()
        os.close(self._fd)


def copy(source: Memfd, target: Memfd, start: int, end: int) -> None:
    """What memory there is between `start` and `end`; OSError if there is no more for it."""
    for at, until in source.extents(start, end):
        target.put(at, source.read(at, until - at))
