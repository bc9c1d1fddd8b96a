"""Many cards in one process, each served by a context of the library: one client at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

import server.serving
from device.function import PciFunction
from protocol.limits import SessionLimits
from server.libvfio_user._context import check
from server.libvfio_user._session import Session
from server.libvfio_user.library import Library
from server.listener import Listener
from server.releasing import Release

__all__ = ["serve"]


async def serve(
    cards: Sequence[tuple[PciFunction, Path | Listener]],
    *,
    library: Library,
    poll_us: int = 0,
    limits: SessionLimits | None = None,
    release: Release | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve each function at its path or listener until cancelled or released, as `server.serve` does.

    ``release`` cannot ask the clients, for the library does not raise REQ, but waits for them to leave.

    Raises `LibraryError` before any card is served if the library cannot serve one of them, and
    `SocketPathError` if one of the sockets cannot be made.
    """
    for function, _ in cards:
        check(library, function)
    with tempfile.TemporaryDirectory(prefix="trionic-") as private:
        session = partial(Session, library=library, path=Path(private) / "context")
        await server.serving.serve(
            cards,
            poll_us=poll_us,
            limits=limits,
            session=session,
            release=release,
            task_status=task_status,
        )
