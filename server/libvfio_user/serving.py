"""Many cards in one process, each served by a context of the library: one client at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from device.function import PciFunction
from protocol.limits import SessionLimits
from server.libvfio_user._context import check
from server.libvfio_user._session import Session
from server.libvfio_user._told import log
from server.libvfio_user.library import Library
from server.listener import Listener

__all__ = ["serve"]


async def serve(
    cards: Sequence[tuple[PciFunction, Path | Listener]],
    *,
    library: Library,
    poll_us: int = 0,
    limits: SessionLimits | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve each function at its path or listener until cancelled, as `server.serve` does.

    Raises `LibraryError` before any card is served if the library cannot serve one of them, and
    `SocketPathError` if one of the sockets cannot be made.
    """
    for function, _ in cards:
        check(library, function)
    with contextlib.ExitStack() as opened:
        private = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="trionic-")))
        listeners = [
            opened.enter_context(place if isinstance(place, Listener) else Listener(place))
            for _, place in cards
        ]
        async with trio.open_nursery() as nursery:
            for number, ((function, _), listener) in enumerate(zip(cards, listeners, strict=True)):
                folder = private / str(number)
                folder.mkdir()
                nursery.start_soon(_serve_card, library, function, listener, folder, poll_us, limits)
            task_status.started()


async def _serve_card(
    library: Library,
    function: PciFunction,
    listener: Listener,
    private: Path,
    poll_us: int,
    limits: SessionLimits | None,
) -> None:
    while True:
        client = await listener.accept()
        log.info("%s: client connected", function.name)
        session = Session(
            library, function, client, private, poll_us=poll_us, limits=limits or SessionLimits()
        )
        try:
            await session.run()
        except Exception:
            # A mistake in one card's code ends one client's stay, not the other cards.
            log.exception("%s: session failed", function.name)
