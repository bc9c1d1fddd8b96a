"""Cards as the settings describe them, made and served until a signal ends it."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import trio

from device.recorder import recording
from firmware.nic import Nic
from firmware.ports import PortError, open_port
from server import Listener, Release, ServerError
from trionic._groups import first_of
from trionic.config import CardConfig, ServeConfig, derive_mac
from trionic.engines import open_engine
from trionic.errors import TrionicError
from trionic.log import configure

__all__ = ["open_cards", "run", "serve_cards"]

log = logging.getLogger("trionic.serve")

# Errors that are told in one line, wherever in the tree of tasks they come up.
_TOLD = (TrionicError, ServerError, PortError)


def run(
    settings: ServeConfig, listeners: Sequence[Listener], log_level: str, ready: Callable[[], None]
) -> None:
    """Serve each card at its listener until SIGINT or SIGTERM; calls ``ready`` once all can be used.

    The signal ends it at once, unless ``settings.release_s`` gives the clients time to let go.

    Raises `TrionicError` with one line for whatever the user can mend.
    """
    configure(log_level)
    try:
        trio.run(_serve_until_signal, settings, listeners, ready)
    except (PortError, ServerError) as error:
        raise TrionicError(str(error)) from error
    except BaseExceptionGroup as group:
        told = first_of(group, _TOLD)
        if told is None:
            raise
        raise TrionicError(str(told)) from told


async def serve_cards(
    settings: ServeConfig,
    listeners: Sequence[Listener] | None = None,
    *,
    release: Release | None = None,
    task_status: trio.TaskStatus[Sequence[Nic]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Make the cards, serve them until cancelled, and give everything back; started once all of them listen.

    ``listeners``, one for each card, if they were made before; else they are made at the cards' sockets.
    ``release`` ends it when all clients have let go.

    Raises `PortError`, `server.ServerError` or `TrionicError`, one line each, for a port, a socket, an engine
    or a recording that cannot be had.
    """
    serve = open_engine(settings.engine)
    with open_cards(settings.cards, settings.poll_us) as nics:
        async with trio.open_nursery() as nursery:
            places: Sequence[Listener | Path] = listeners or [card.socket for card in settings.cards]
            served = [(nic.function, place) for nic, place in zip(nics, places, strict=True)]

            async def start(task_status: trio.TaskStatus[None]) -> None:
                await serve(served, poll_us=settings.poll_us, release=release, task_status=task_status)
                nursery.cancel_scope.cancel()

            await nursery.start(start)
            for nic in nics:
                nursery.start_soon(nic.run)
            task_status.started(nics)


@contextlib.contextmanager
def open_cards(cards: Sequence[CardConfig], poll_us: int = 0) -> Iterator[Sequence[Nic]]:
    """The cards with their ports open, closed again at the end.

    `PortError` if a port cannot be had, `TrionicError` if a recording cannot be made.
    """
    with contextlib.ExitStack() as opened:
        nics = []
        for card in cards:
            port = open_port(card.port)
            undo = opened.enter_context(contextlib.ExitStack())
            undo.callback(port.close)
            nic = Nic(
                port,
                name=card.socket.name,
                mac=card.mac or derive_mac(card.socket),
                mtu=card.mtu,
                bar2_size=card.bar2_size,
                offloads=card.offloads,
                msix=card.msix,
                revocation=card.revocation,
                profile=card.profile,
                busy_poll_us=poll_us,
            )
            undo.pop_all()  # from now on the card closes its port
            opened.callback(nic.close)
            if card.record is not None:
                try:
                    opened.enter_context(recording(nic.card, card.record))
                except OSError as error:
                    raise TrionicError(f"cannot record in {card.record}: {error.strerror}") from error
            nics.append(nic)
        yield nics


async def _serve_until_signal(
    settings: ServeConfig, listeners: Sequence[Listener], ready: Callable[[], None]
) -> None:
    release = Release()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def serve(task_status: trio.TaskStatus[Sequence[Nic]]) -> None:
                await serve_cards(settings, listeners, release=release, task_status=task_status)
                nursery.cancel_scope.cancel()

            await nursery.start(serve)
            ready()
            async for _ in signals:
                if release.asked or not settings.release_s:
                    nursery.cancel_scope.cancel()
                    break
                log.info("ending within %d s; another signal ends at once", settings.release_s)
                nursery.cancel_scope.deadline = trio.current_time() + settings.release_s
                release.ask()
    if nursery.cancel_scope.cancelled_caught and trio.current_time() >= nursery.cancel_scope.deadline:
        log.warning("clients did not let go in %d s", settings.release_s)
