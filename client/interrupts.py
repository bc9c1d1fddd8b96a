"""Interrupts as eventfds that a task can wait for.

    async with msix(session, 3) as vectors:
        count = await vectors[1].wait()

MSI and MSI-X count: `wait` says how often the vector fired since the last time. INTx is a level: after it
fired it stays masked until `unmask`, and fires again at once if the device still asserts it.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from typing import Final

import trio

from client._eventfd import make_eventfd, signal, take
from client.errors import ClientError
from client.session import Session
from protocol.limits import DISABLE_TIMEOUT
from protocol.vfio import IrqIndex, IrqInfoFlags, IrqSetFlags

_WIRE: Final = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
_DISABLE: Final = IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER


class Interrupt:
    """One vector: an eventfd that the server writes to. One task at a time may wait."""

    def __init__(self, session: Session, index: IrqIndex, vector: int) -> None:
        self.session = session
        self.index = index
        self.vector = vector
        self.fd = make_eventfd()

    def poll(self) -> int:
        """How often it fired since the last `poll` or `wait`; 0 if not. Never blocks."""
        return take(self.fd)

    async def wait(self) -> int:
        """Wait until it fires; how often it did since the last time, at least 1."""
        while True:
            await trio.lowlevel.wait_readable(self.fd)
            count = self.poll()
            if count:
                return count

    async def mask(self) -> None:
        """Tell the device to hold this vector back; raises ServerError where the kind cannot be masked."""
        await self._act(IrqSetFlags.ACTION_MASK)

    async def unmask(self) -> None:
        """Let it fire again; for INTx after each interrupt, once the device was told to take its line
        down.
        """
        await self._act(IrqSetFlags.ACTION_UNMASK)

    async def trigger(self) -> None:
        """Make the server fire it, as a test of the wiring."""
        await self._act(IrqSetFlags.ACTION_TRIGGER)

    async def _act(self, action: IrqSetFlags) -> None:
        await act(self.session, self.index, self.vector, action)

    def close(self) -> None:
        """Close the eventfd; whoever waits gets trio.ClosedResourceError."""
        trio.lowlevel.notify_closing(self.fd)
        os.close(self.fd)


class IntxLine(Interrupt):
    """The legacy interrupt line. `unmask` goes by message, or by an eventfd after `wire_unmask`."""

    def __init__(self, session: Session) -> None:
        super().__init__(session, IrqIndex.INTX, 0)
        self._unmask_fd = -1

    async def wire_unmask(self) -> None:
        """Give the server an eventfd to listen on, as KVM's resamplefd does; `unmask_now` then costs no
        message.
        """
        fd = make_eventfd()
        try:
            await wire_unmask(self.session, fd)
        except BaseException:
            os.close(fd)
            raise
        self._close_unmask()
        self._unmask_fd = fd

    def unmask_now(self) -> None:
        """Unmask through the eventfd; raises ClientError without `wire_unmask`."""
        if self._unmask_fd < 0:
            raise ClientError("INTx has no unmask eventfd: call wire_unmask first")
        signal(self._unmask_fd)

    def close(self) -> None:
        """Close both eventfds."""
        self._close_unmask()
        super().close()

    def _close_unmask(self) -> None:
        if self._unmask_fd >= 0:
            os.close(self._unmask_fd)
            self._unmask_fd = -1


async def act(session: Session, index: IrqIndex, vector: int, action: IrqSetFlags) -> None:
    """Mask, unmask or trigger one vector."""
    await session.set_irqs(index, IrqSetFlags.DATA_NONE | action, vector, 1)


async def wire_unmask(session: Session, fd: int) -> None:
    """Let the server unmask INTx whenever this eventfd is signalled."""
    flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_UNMASK
    await session.set_irqs(IrqIndex.INTX, flags, 0, 1, fds=(fd,))


async def unwire(session: Session, index: IrqIndex) -> None:
    """Let the server forget all eventfds of a kind."""
    await session.set_irqs(index, _DISABLE)


def require(session: Session, index: IrqIndex, vectors: int) -> None:
    """Raises ClientError if the device has not so many vectors of a kind, or the server takes no eventfds for
    them.
    """
    available = session.irqs[index].count if index < len(session.irqs) else 0
    if vectors > available:
        raise ClientError(f"{vectors} vectors of {index.name}: the device has {available}")
    if vectors and not session.connection.peer.max_msg_fds:
        raise ClientError("the server takes no descriptors, so no interrupts can be wired")


async def wire(session: Session, index: IrqIndex, start: int, fds: Sequence[int]) -> None:
    """Give the server the eventfds of vectors from `start` on, as many in a message as it takes.

    A kind that does not grow (NORESIZE) is claimed whole before it is wired piece by piece. `require` tells
    beforehand whether it is possible at all.
    """
    step = session.connection.peer.max_msg_fds
    if len(fds) > step and IrqInfoFlags.NORESIZE in session.irqs[index].flags:
        await session.set_irqs(index, _WIRE, start, len(fds))
    for at in range(0, len(fds), step):
        part = fds[at : at + step]
        await session.set_irqs(index, _WIRE, start + at, len(part), fds=part)


@asynccontextmanager
async def _wired(session: Session, index: IrqIndex, vectors: Sequence[Interrupt]) -> AsyncIterator[None]:
    require(session, index, len(vectors))
    try:
        await wire(session, index, 0, [vector.fd for vector in vectors])
        yield
    finally:
        with trio.move_on_after(DISABLE_TIMEOUT, shield=True), suppress(ClientError):
            await unwire(session, index)


@asynccontextmanager
async def _vectors(session: Session, index: IrqIndex, count: int) -> AsyncIterator[tuple[Interrupt, ...]]:
    async with AsyncExitStack() as stack:
        vectors: tuple[Interrupt, ...] = ()
        for vector in range(count):
            vectors += (Interrupt(session, index, vector),)
            stack.callback(vectors[-1].close)
        await stack.enter_async_context(_wired(session, index, vectors))
        yield vectors


def msix(session: Session, count: int) -> AbstractAsyncContextManager[tuple[Interrupt, ...]]:
    """The first `count` MSI-X vectors, wired until the block ends; raises ClientError if there are not so
    many.
    """
    return _vectors(session, IrqIndex.MSIX, count)


def msi(session: Session, count: int) -> AbstractAsyncContextManager[tuple[Interrupt, ...]]:
    """The first `count` MSI vectors, wired until the block ends; raises ClientError if there are not so
    many.
    """
    return _vectors(session, IrqIndex.MSI, count)


@asynccontextmanager
async def intx(session: Session) -> AsyncIterator[IntxLine]:
    """The INTx line, wired until the block ends; raises ClientError if the device has none."""
    async with AsyncExitStack() as stack:
        line = IntxLine(session)
        stack.callback(line.close)
        await stack.enter_async_context(_wired(session, IrqIndex.INTX, [line]))
        yield line


@asynccontextmanager
async def _sole(session: Session, index: IrqIndex) -> AsyncIterator[Interrupt]:
    async with _vectors(session, index, 1) as (interrupt,):
        yield interrupt


def err(session: Session) -> AbstractAsyncContextManager[Interrupt]:
    """Fires when the device has failed for good (VFIO_PCI_ERR_IRQ_INDEX); raises ClientError if it cannot
    tell.
    """
    return _sole(session, IrqIndex.ERR)


def req(session: Session) -> AbstractAsyncContextManager[Interrupt]:
    """Fires when whoever serves the device wants it back (VFIO_PCI_REQ_IRQ_INDEX), again and again until the
    session ends; raises ClientError if nobody will.
    """
    return _sole(session, IrqIndex.REQ)
