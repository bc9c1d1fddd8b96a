"""Memory that the device may reach: a memfd mapped here and, by DMA_MAP, at an I/O virtual address there."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import trio

from client.errors import ClientError, ServerError
from client.session import READ_WRITE, Session
from protocol import LocalProtocolError
from protocol.vfio import DmaMapFlags

PAGE: Final = mmap.PAGESIZE

UNMAP_TIMEOUT: Final = 2.0
"""Seconds that a server gets to let go of a window when its block ends by an exception or a cancellation."""

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class DmaBuffer:
    """A piece of a window: the same bytes as `view` here and at `iova` for the device."""

    iova: int
    view: memoryview


class DmaMemory:
    """A window of `size` bytes at `iova`, zeroed. Made by `dma_memory`.

    The memfd is sealed against changing its size: neither side can make the other's access a SIGBUS.
    """

    def __init__(self, size: int, iova: int) -> None:
        self.size = size
        self.iova = iova
        self.fd = os.memfd_create("dma", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(self.fd, size)
        except BaseException:
            os.close(self.fd)
            raise
        self.view = memoryview(self._memory)
        self._taken = 0
        self._given: list[memoryview] = []

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
        """Unmap here and release the views given out; the mapping lives on while somebody made others of
        them.
        """
        for view in (*self._given, self.view):
            with suppress(BufferError):
                view.release()
        with suppress(BufferError):
            self._memory.close()
        os.close(self.fd)


@asynccontextmanager
async def dma_memory(
    session: Session, size: int, *, iova: int | None = None, flags: DmaMapFlags = READ_WRITE
) -> AsyncIterator[DmaMemory]:
    """A window of memory (`size` bytes, rounded up to pages) that the device reaches until the block ends.

    `iova` picks the address, otherwise a free one is taken. Raises ServerError if the server refuses the
    window. A mapping that is cancelled before its answer is taken back like any other. The address of a
    window that the server does not let go of stays taken for the rest of the session.
    """
    size = -(-size // PAGE) * PAGE
    start = session.iovas.take(size, at=iova)
    mapped = False
    try:
        memory = DmaMemory(size, start)
        try:
            mapped = True
            try:
                await session.dma_map(start, size, flags, memory.fd)
            except (ServerError, LocalProtocolError):
                mapped = False
                raise
            yield memory
        finally:
            if mapped:
                with trio.move_on_after(UNMAP_TIMEOUT, shield=True), suppress(ClientError):
                    await session.dma_unmap(start, size)
                    mapped = False
            memory.close()
    finally:
        if not mapped:
            session.iovas.give(start, size)
