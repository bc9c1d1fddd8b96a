"""A client's mapping of a BAR, touched without the risk of SIGBUS.

The kernel touches it, on our behalf: write(2) and readv(2) fault as a load and a store do, and where those
would be SIGBUS they fail with EFAULT.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager


class Mapping:
    """`size` bytes of the file `fd`, which must be as long when this is made."""

    def __init__(self, fd: int, size: int) -> None:
        self._memory = mmap.mmap(fd, size)
        self._out, self._in = os.pipe()

    def load(self, offset: int, count: int = 1) -> bytes | None:
        """Bytes within a page; None where it would be SIGBUS."""
        try:
            os.write(self._in, memoryview(self._memory)[offset : offset + count])
        except OSError as error:
            assert error.errno == errno.EFAULT
            return None
        return os.read(self._out, count)

    def store(self, offset: int, data: bytes) -> bool:
        """Write within a page; whether it was no SIGBUS."""
        os.write(self._in, data)
        try:
            os.readv(self._out, [memoryview(self._memory)[offset : offset + len(data)]])
        except OSError as error:
            assert error.errno == errno.EFAULT
            os.read(self._out, len(data))
            return False
        return True

    def close(self) -> None:
        """Unmap."""
        self._memory.close()
        os.close(self._in)
        os.close(self._out)


@contextmanager
def mapped(fd: int, size: int) -> Iterator[Mapping]:
    """A mapping for the time of the block."""
    mapping = Mapping(fd, size)
    try:
        yield mapping
    finally:
        mapping.close()
