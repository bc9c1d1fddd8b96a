"""What can be mapped for DMA: memory, or part of a BAR."""

from __future__ import annotations

import fcntl
import mmap
import os
from dataclasses import dataclass
from errno import EFAULT, EINVAL
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from client.container.errors import ContainerError
from client.container.limits import PAGE

if TYPE_CHECKING:
    from client.dmabuf import BarExport
    from client.mapping import BarMapping

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

HUGE_PAGE: Final = 2 << 20
"""Bytes of the huge pages that `PageMemory.allocate` asks for, on every machine that it runs on."""


class _File:
    """A descriptor and its mapping here, until the last user lets go."""

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self.users = 0
        try:
            self.fd = os.dup(fd)
        except OSError as error:
            raise ContainerError(error.errno or EINVAL, "memory that is no file") from None
        try:
            writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
            if os.fstat(fd).st_size < offset + length:
                raise ContainerError(EFAULT, f"the memory ends before {offset:#x}+{length:#x}")
            prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._memory = mmap.mmap(self.fd, length, mmap.MAP_SHARED, prot, offset=offset)
        except OSError as error:
            os.close(self.fd)
            raise ContainerError(error.errno or EINVAL, "memory that cannot be mapped here") from None
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._memory)

    def let_go(self) -> None:
        self.users -= 1
        if self.users:
            return
        os.close(self.fd)
        self.fd = -1
        self.view.release()
        try:
            self._memory.close()
        except BufferError:  # somebody holds a view of his own: the mapping goes with it
            return


class PageMemory:
    """`length` bytes at `offset` of a file: a memfd, huge pages or a file on a disk. A context manager.

    The descriptor stays the caller's. The memory lives on after `close` while it is mapped or pinned, and
    views of it as long as they are held; what nobody has any more is closed. A file that somebody makes
    shorter kills this process with SIGBUS at the next access: map what you trust. Raises ContainerError:
    EINVAL for a range that is empty or not made of pages, EFAULT for one that the file has not, or what mmap
    says of the file.
    """

    _closed = True  # until it is open

    def __init__(self, fd: int, offset: int, length: int) -> None:
        if length <= 0 or offset < 0 or offset % PAGE or length % PAGE:
            raise ContainerError(EINVAL, f"memory at {offset:#x}+{length:#x} of a file")
        self._open(_File(fd, offset, length), offset, offset, length)

    def _open(self, file: _File, begin: int, offset: int, length: int) -> None:
        self._file = file
        self._begin = begin
        self.offset = offset
        self.length = length
        self._closed = False
        self.view = file.view[offset - begin : offset - begin + length]
        """The same bytes here."""
        file.users += 1

    @classmethod
    def allocate(cls, size: int, *, hugetlb: bool = False) -> Self:
        """`size` zeroed bytes, rounded up to pages, that nobody can make fewer; huge pages if so wanted.
        Raises ContainerError: ENOMEM if the machine has not so many huge pages.
        """
        page = HUGE_PAGE if hugetlb else PAGE
        size = -(-size // page) * page
        huge = os.MFD_HUGETLB | os.MFD_HUGE_2MB if hugetlb else 0
        try:
            fd = os.memfd_create("dma", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | huge)
        except OSError as error:
            raise ContainerError(error.errno or EINVAL, "no memory of that kind") from None
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, 0, size)
        finally:
            os.close(fd)

    def part(self, offset: int, length: int) -> PageMemory:
        """Some of it, which has its own `close`. Raises ContainerError: EINVAL if it has not those pages,
        EFAULT if it is closed.
        """
        if self._closed:
            raise ContainerError(EFAULT, "the memory is closed")
        if offset < 0 or length <= 0 or offset + length > self.length or offset % PAGE or length % PAGE:
            raise ContainerError(EINVAL, f"{offset:#x}+{length:#x} of {self.length:#x} bytes")
        made = PageMemory.__new__(PageMemory)
        made._open(self._file, self._begin, self.offset + offset, length)
        return made

    @property
    def fd(self) -> int:
        """The file, this object's; -1 when the memory is gone."""
        return self._file.fd

    @property
    def writable(self) -> bool:
        """Whether a device may be allowed to write there."""
        return not self._file.view.readonly

    def hold(self) -> PageMemory:
        """The same once more: the memory stays until that is closed too."""
        return self.part(0, self.length)

    def close(self) -> None:
        """Be done with it; once."""
        if not self._closed:
            self._closed = True
            self.view.release()
            self._file.let_go()

    def __del__(self) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class PageRef:
    """A page of memory that is pinned: it is there until it is unpinned, whoever closes what."""

    memory: PageMemory
    offset: int
    """Bytes from the beginning of `memory`."""

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        return self.memory.view[self.offset : self.offset + PAGE]


@dataclass(frozen=True, slots=True)
class BarRange:
    """`length` bytes at `offset` of a region that is mapped here; no pages, but what the kernel calls a
    PFNMAP. The mapping stays the caller's, and open while this is mapped. It is to follow its session's
    `decoding`: nobody else takes it back from devices when its own stops to answer.
    """

    mapping: BarMapping
    offset: int
    length: int


Backing: TypeAlias = "PageMemory | BarRange | BarExport"
