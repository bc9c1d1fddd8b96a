"""A BAR of memory that the host maps."""

import errno
import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import suppress

from device.errors import DeviceError
from device.pci.bars import BarKind, check_bar

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def _nothing() -> None:
    pass


class MemoryBar:
    """`size` bytes of memory in a memfd of their own, whole and mappable; zero at power-on.

    Unless `sealed`, the memfd can still be truncated, so that its mappings can be revoked one day. Whoever
    has the fd can do that, and then the next access raises SIGBUS here as well as in the client: memory whose
    fd is given to a client must be sealed (F_SEAL_SHRINK, F_SEAL_GROW; F_SEAL_SEAL, so that nobody can forbid
    clearing it). `size` must be whole pages to be mappable: ValueError.
    """

    def __init__(
        self,
        index: int,
        size: int,
        *,
        kind: BarKind = BarKind.MEM64,
        prefetchable: bool = True,
        sealed: bool = False,
    ) -> None:
        check_bar(index, size, kind)
        if size % mmap.PAGESIZE:
            raise ValueError(f"BAR {index}: {size:#x} bytes are not whole pages, so nobody could map them")
        self.index = index
        self.size = size
        self.kind = kind
        self.prefetchable = prefetchable
        self.sealed = sealed
        self.on_renew: Callable[[], None] = _nothing
        self.fd, self.memory = self._create()

    def _create(self) -> tuple[int, mmap.mmap]:
        fd = os.memfd_create(f"bar{self.index}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self.size)
            if self.sealed:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return fd, mmap.mmap(fd, self.size)
        except BaseException:
            os.close(fd)
            raise

    def read(self, offset: int, count: int) -> bytes:
        """Read `count` bytes; DeviceError(EINVAL) outside the BAR."""
        self._check(offset, count)
        return self.memory[offset : offset + count]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write `data`; DeviceError(EINVAL) outside the BAR."""
        self._check(offset, len(data))
        self.memory[offset : offset + len(data)] = data

    def _check(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise DeviceError(
                errno.EINVAL,
                f"BAR {self.index}: {count} bytes at {offset:#x} lie outside {self.size:#x} bytes",
            )

    def clear(self) -> None:
        """All zero again, in place: whoever has it mapped sees zeros."""
        self.memory.madvise(mmap.MADV_REMOVE)

    def renew(self) -> None:
        """New memory, all zero.

        Mappings of the old one, such as those of a client that left, no longer reach the card.
        """
        old_fd, old_memory = self.fd, self.memory
        self.fd, self.memory = self._create()
        self.on_renew()
        _release(old_fd, old_memory)

    def close(self) -> None:
        """Give the memory back; the BAR is of no use afterwards."""
        _release(self.fd, self.memory)


def _release(fd: int, memory: mmap.mmap) -> None:
    os.close(fd)
    with suppress(BufferError):  # somebody still holds a view: the mapping goes with the last one
        memory.close()
