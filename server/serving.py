"""Many cards in one process: each has its own socket, and one client at a time."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, Protocol

import trio

from device.function import PciFunction, ResetKind
from protocol.limits import SessionLimits
from server.listener import Listener
from server.releasing import Release
from server.session import Session

__all__ = ["serve"]

log = logging.getLogger("trionic.server")

# Until a reset that failed is tried again: what it lacked, descriptors or memory, others give back.
_RESET_PAUSE_S: Final = 0.1


class Stay(Protocol):
    """A client's stay on a card."""

    async def run(self) -> None:
        """Serve until the client leaves; raises nothing because of what a client does."""


MakeStay = Callable[..., Stay]


async def serve(
    cards: Sequence[tuple[PciFunction, Path | Listener]],
    *,
    poll_us: int = 0,
    limits: SessionLimits | None = None,
    session: MakeStay = Session,
    release: Release | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve each function at its path or listener until cancelled; started once all of them listen.

    With ``release`` it can be ended in good order as well: it returns when all clients have let go.

    ``poll_us``: microseconds to spin for a client's next message before sleeping. ``session`` makes the stay
    of a client, from function and socket. A second client of a card waits until the first has left. Sockets
    are removed at the end, however it comes; the functions are left to whoever made them. Raises
    `SocketPathError` before any card is served, if one of the sockets cannot be made.
    """
    release = release or Release()
    with contextlib.ExitStack() as sockets:
        listeners = [
            sockets.enter_context(place if isinstance(place, Listener) else Listener(place))
            for _, place in cards
        ]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(release.relay)
            async with trio.open_nursery() as served:
                for (function, _), listener in zip(cards, listeners, strict=True):
                    served.start_soon(_serve_card, function, listener, poll_us, limits, session, release)
                task_status.started()
            nursery.cancel_scope.cancel()


async def _serve_card(
    function: PciFunction,
    listener: Listener,
    poll_us: int,
    limits: SessionLimits | None,
    session: MakeStay,
    release: Release,
) -> None:
    while client := await release.unless_asked(listener.accept):
        if release.asked:
            client.close()  # it came at the very moment of asking
            return
        log.info("%s: client connected", function.name)
        try:
            with release.attached(function):
                await session(function, client, poll_us=poll_us, limits=limits).run()
        except Exception:
            # A mistake in one card's code ends one client's stay, not the other cards.
            log.exception("%s: session failed", function.name)
            await release.unless_asked(partial(_forget_client, function))


async def _forget_client(function: PciFunction) -> None:
    """Reset the card after a stay that failed, perhaps in just that: until then nobody else gets it."""
    told = False
    while True:
        try:
            function.reset(ResetKind.LOST_CLIENT)
        except Exception as error:
            if not told:
                log.error("%s: serves nobody until it can be reset: %s", function.name, error)
            told = True
            await trio.sleep(_RESET_PAUSE_S)
        else:
            return
