"""A session that is attached to a container, and the windows that it was given."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from errno import EACCES, EBADF, EEXIST, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, ENOSPC, EOVERFLOW, EPERM
from typing import Final

import trio

from client.container._sources import Reach
from client.container.errors import ContainerError
from client.container.limits import REVOKE_TRIES
from client.errors import BadReplyError, ClientError, Disconnected, ServerError
from client.session import Session
from protocol import LocalProtocolError
from protocol.vfio import DmaMapFlags

log = logging.getLogger(__name__)

_UNMAPPABLE: Final = frozenset({EACCES, EBADF, EINVAL, ENODEV, ENOMEM, ENOSPC, EOVERFLOW, EPERM})
"""What a server says that cannot map a descriptor, but may take the window without."""

_NOT_THERE: Final = frozenset({EINVAL, ENOENT})
"""What a server says that is to unmap what it has not."""


@contextmanager
def _copy_of(fd: int) -> Iterator[int]:
    """A BAR's may be closed by its session while a server takes its time, and be another file's then."""
    try:
        copy = os.dup(fd)
    except OSError as error:
        raise ContainerError(error.errno or EBADF, "a file that cannot be passed on") from None
    try:
        yield copy
    finally:
        os.close(copy)


@dataclass(slots=True)
class _Holding:
    """What one mapping has in a session: an address there, and a window for each range of its file."""

    size: int
    windows: list[tuple[int, int]] = field(default_factory=list)
    sure: bool = True
    """Whether the server has answered for every window."""
    vanishes: bool = False
    stale: bool = False
    """Whether what the server did not give back of it is no mapping's any more."""


class Device:
    """Nothing here may be cancelled by halves: what takes and lets go runs until it is done, or its windows
    are let go of again.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.watching = trio.CancelScope()
        """Of the task that waits for the end of the session."""
        self.pins_only = False
        """Whether it has said, by pinning, that it writes to pinned pages only."""
        self._held: dict[int, _Holding] = {}

    def check_page(self, *numbers: int) -> None:
        """Raises ContainerError(EINVAL) unless these addresses and sizes are multiples of the server's
        pages.
        """
        try:
            page = self.session.dma_page_size
        except ClientError as error:
            raise ContainerError(EINVAL, str(error)) from None
        if any(number % page for number in numbers):
            raise ContainerError(EINVAL, f"the server's pages are of {page:#x} bytes")

    @property
    def held(self) -> tuple[int, ...]:
        """Where the server has, or may have, something mapped."""
        return tuple(self._held)

    async def take(self, iova: int, size: int, reach: Reach, flags: DmaMapFlags) -> None:
        """Map it. Raises ContainerError, and the server has nothing of it then; only where it answered with
        nonsense, or this is cancelled, `let_go` is to be called. Nothing happens if the session is over.
        """
        with suppress(Disconnected), _copy_of(reach.fd) as fd:
            most = self.session.connection.peer.max_dma_maps
            if len(self.session.windows) + len(reach.ranges) > most:
                raise ContainerError(ENOSPC, f"the server takes {most} DMA windows at a time")
            if iova in self._held and self._held[iova].stale:
                await self.let_go(iova)
            holding = self._holding(iova, size)
            holding.vanishes = reach.vanishes
            at = 0
            for one in reach.ranges:
                if (iova + at, one.len) in holding.windows:
                    at += one.len
                    continue
                view = None if reach.view is None else reach.view[at : at + one.len]
                try:
                    await self._map(holding, iova + at, one.len, flags, fd, one.paddr, view)
                except ContainerError:
                    if view is not None:  # which the traceback would keep, and so the BAR's mapping
                        view.release()
                    await self.let_go(iova)
                    raise
                at += one.len

    def _holding(self, iova: int, size: int) -> _Holding:
        """That of a mapping: a new one, or what it did not give back."""
        holding = self._held.get(iova)
        if holding is None:
            try:
                self.session.iovas.take(size, at=iova)
            except ClientError as error:
                raise ContainerError(EEXIST, str(error)) from None
            holding = self._held[iova] = _Holding(size)
        return holding

    async def _map(
        self,
        holding: _Holding,
        iova: int,
        size: int,
        flags: DmaMapFlags,
        fd: int,
        offset: int,
        view: memoryview | None,
    ) -> None:
        """One window; a server that cannot map its file reaches it by message if it can be reached here."""
        holding.windows.append((iova, size))
        try:
            holding.sure = False
            try:
                await self.session.dma_map(iova, size, flags, fd, offset, view=view)
            except ServerError as refusal:
                if view is None or refusal.errno not in _UNMAPPABLE:
                    raise
                try:
                    await self.session.dma_map(iova, size, flags, view=view)
                except ServerError:
                    raise refusal from None
        except ServerError as refusal:
            error = ContainerError(refusal.errno, "the server refuses DMA_MAP")
        except (LocalProtocolError, OSError) as mistake:
            error = ContainerError(getattr(mistake, "errno", None) or EIO, str(mistake))
        except BadReplyError as mistake:
            raise ContainerError(EIO, str(mistake)) from None
        except Disconnected:
            raise
        except ClientError as refusal:  # by the session itself: nothing was sent
            error = ContainerError(EEXIST, str(refusal))
        else:
            holding.sure = True
            return
        holding.sure = True
        holding.windows.pop()
        raise error

    def disown(self, iova: int) -> None:
        """What the server has kept there is not what is wanted there next."""
        if iova in self._held:
            self._held[iova].stale = True

    async def let_go(self, iova: int) -> None:
        """Unmap it if the server has it. Raises ContainerError if the server keeps it; its address stays
        taken then.
        """
        holding = self._held.get(iova)
        if holding is None:
            return
        while holding.windows:
            await self._unmap(holding, *holding.windows[-1])
            holding.windows.pop()
        del self._held[iova]
        self.session.iovas.give(iova, holding.size)

    async def _unmap(self, holding: _Holding, iova: int, size: int) -> None:
        try:
            await self.session.dma_unmap(iova, size)
        except Disconnected:
            pass
        except trio.Cancelled:
            holding.sure = False
            raise
        except ServerError as refusal:
            if holding.sure or refusal.errno not in _NOT_THERE:
                raise ContainerError(refusal.errno, "the server refuses DMA_UNMAP") from None
        except (ClientError, LocalProtocolError) as mistake:  # it let go, or it did not
            self.session.hang_up(f"nobody knows whether a window is unmapped: {mistake}")
        self.session.windows.remove(iova, size)

    async def let_go_for_good(self, iova: int) -> None:
        """The same when nobody will ask again: what will vanish must not be kept."""
        holding = self._held.get(iova)
        must = holding is not None and holding.vanishes
        await (self.must_let_go if must else self.let_go)(iova)

    async def must_let_go(self, iova: int) -> None:
        """The same for memory that is about to vanish: a server that keeps it loses its session."""
        for _ in range(REVOKE_TRIES):
            with suppress(ContainerError):
                return await self.let_go(iova)
        log.error("a server does not let go of a BAR that is mapped at %#x: its session is ended", iova)
        self.session.hang_up("the server keeps a window of memory that is gone")
        return await self.let_go(iova)
