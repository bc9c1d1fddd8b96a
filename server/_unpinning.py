"""Waiting for memory that somebody holds: a DMA_UNMAP, or the end of running, is answered when it is free.

Nothing of the session is handled meanwhile, for what comes next counts on the answer. Other cards go on.
"""

from __future__ import annotations

import select
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from device.dma import PinnedError
from device.function import PciFunction
from server._wire import ClientLeftError

__all__ = ["tell_balance", "unpinned"]


@asynccontextmanager
async def unpinned(
    function: PciFunction,
    held: PinnedError,
    client: socket.socket,
    deadline: float,
    tell: Callable[[str], object],
) -> AsyncIterator[None]:
    """Wait until what ``held`` names is released. Within the block nothing of it is pinned, nor can be.

    `PinnedError` when it is not within ``deadline`` seconds; ``tell`` then hears who holds it.
    `ClientLeftError` as soon as ``client``, of which nothing is read, hangs up.
    """
    pins = function.dma.pins
    token = trio.lowlevel.current_trio_token()
    woken, left = trio.Event(), trio.Event()

    async def watch(hung_up: select.epoll) -> None:
        await trio.lowlevel.wait_readable(hung_up)
        left.set()
        woken.set()

    with pins.leaving(held.first, held.last, lambda: token.run_sync_soon(woken.set)):
        with trio.move_on_after(deadline), select.epoll() as hung_up:
            hung_up.register(client, 0)  # EPOLLHUP and EPOLLERR are told without being asked for
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, hung_up)
                await woken.wait()
                nursery.cancel_scope.cancel()
        if left.is_set():
            raise ClientLeftError
        try:
            with function.gate:
                pins.check(held.first, held.last)
        except PinnedError as error:
            tell(f"given up after {deadline:g} s: {error.strerror}")
            raise
        yield


def tell_balance(function: PciFunction, tell: Callable[..., object]) -> None:
    """Tell, at the end of a stay, how many pages were pinned and released, if any were."""
    counters = function.dma.pins.counters
    if counters.acquired:
        tell("%s: pages pinned: %d, released: %d", function.name, counters.acquired, counters.released)
