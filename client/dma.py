"""Memory that the device may reach: mapped here and, by DMA_MAP, at an I/O virtual address there.

Shared memory is a memfd that the server maps as well. Memory that is not shared it reaches by DMA_READ and
DMA_WRITE alone, which the session answers.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import trio

from client.errors import ClientError
from client.session import READ_WRITE, Session
from protocol.limits import MAX_DMA_PAGE, UNMAP_TIMEOUT
from protocol.vfio import DmaMapFlags

PAGE: Final = mmap.PAGESIZE

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class DmaBuffer:
    """A piece of a window: the same bytes as `view` here and at `iova` for the device."""

    iova: int
    view: memoryview


class Arena:
    """`view` is memory that the device reaches at `iova`; pieces of it are allocated. Somebody else maps and
    unmaps it.
    """

    def __init__(self, view: memoryview, iova: int) -> None:
        self.view = view
        self.size = len(view)
        self.iova = iova
        self._taken = 0
        self._given: list[memoryview] = []

    @property
    def present(self) -> bool:
        """Whether the device reaches it now, and `view` is the same memory."""
        return True

    async def wait_gone(self) -> None:
        """Until it is not present."""
        await trio.sleep_forever()

    def allocate(self, size: int, *, align: int = 64) -> DmaBuffer:
        """The next free piece, aligned to a power of two; raises ClientError when the window is full.
        Nothing is given back singly.
        """
        start = -(-self._taken // align) * align
        if start + size > self.size:
            raise ClientError(f"{size} bytes of DMA memory: {self.size - self._taken} are left")
        self._taken = start + size
        view = self.view[start : start + size]
        self._given.append(view)
        return DmaBuffer(self.iova + start, view)

    def clear(self) -> None:
        """Forget all allocations and zero the memory; their views are to be out of use."""
        self._taken = 0
        self._given.clear()
        self.view[:] = bytes(self.size)

    def close(self) -> None:
        """Release the views given out."""
        for view in (*self._given, self.view):
            with suppress(BufferError):
                view.release()


class DmaMemory(Arena):
    """A window of `size` bytes at `iova`, zeroed. Made by `dma_memory`.

    The memfd of shared memory is sealed against changing its size: neither side can make the other's access
    a SIGBUS. `fd` is None where the memory is not shared.
    """

    def __init__(self, size: int, iova: int, *, shared: bool = True) -> None:
        self.fd: int | None = None
        if shared:
            self.fd = os.memfd_create("dma", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            if self.fd is not None:
                os.ftruncate(self.fd, size)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(-1 if self.fd is None else self.fd, size)
        except BaseException:
            if self.fd is not None:
                os.close(self.fd)
            raise
        super().__init__(memoryview(self._memory), iova)

    def close(self) -> None:
        """Unmap here and release the views given out; the mapping lives on while somebody made others of
        them.
        """
        super().close()
        with suppress(BufferError):
            self._memory.close()
        if self.fd is not None:
            os.close(self.fd)


@asynccontextmanager
async def dma_memory(
    session: Session,
    size: int,
    *,
    iova: int | None = None,
    flags: DmaMapFlags = READ_WRITE,
    shared: bool = True,
) -> AsyncIterator[DmaMemory]:
    """A window of memory (`size` bytes, rounded up to pages of both sides) that the device reaches until the
    block ends; by messages alone if it is not `shared`.

    `iova` picks the address, otherwise a free one is taken. Raises ServerError if the server refuses the
    window, ClientError if the server said before that it would (max_dma_maps, pgsizes).
    A mapping that is cancelled before its answer is taken back like any other. The address of a window that
    the server does not let go of stays taken for the rest of the session.
    """
    page = max(PAGE, session.dma_page_size)
    if page > MAX_DMA_PAGE:
        raise ClientError(f"the server's smallest page for DMA has {page:#x} bytes")
    size = -(-size // page) * page
    start = session.iovas.take(size, align=page, at=iova)
    try:
        memory = DmaMemory(size, start, shared=shared)
    except BaseException:
        session.iovas.give(start, size)
        raise
    try:
        async with _window(session, memory, flags):
            yield memory
    finally:
        memory.close()


@asynccontextmanager
async def mapped_in(
    session: Session, memory: DmaMemory, *, flags: DmaMapFlags = READ_WRITE
) -> AsyncIterator[None]:
    """The memory of another session in this one too, at the same address; raises as `dma_memory` does."""
    session.iovas.take(memory.size, at=memory.iova)
    async with _window(session, memory, flags):
        yield


@asynccontextmanager
async def _window(session: Session, memory: DmaMemory, flags: DmaMapFlags) -> AsyncIterator[None]:
    """Map the memory; its address was taken, and is given back if the server has let go of it."""
    iova, size = memory.iova, memory.size
    try:
        await session.dma_map(iova, size, flags, memory.fd, view=memory.view)
        yield
    finally:
        free = (iova, size) not in session.windows  # it was refused, by the server or before
        if not free:
            with trio.move_on_after(UNMAP_TIMEOUT, shield=True), suppress(ClientError):
                await session.dma_unmap(iova, size)
                free = True
            session.windows.remove(iova, size)
        if free:
            session.iovas.give(iova, size)
