"""Giving cards up: their clients are asked to let go, as the kernel asks before it takes a device away."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import trio

from device.function import PciFunction

__all__ = ["REPEAT_S", "Release"]

log = logging.getLogger("trionic.server")

# Seconds between two requests to the same client (drivers/vfio/vfio_main.c, vfio_unregister_group_dev).
REPEAT_S: Final = 10.0

_T = TypeVar("_T")


class Release:
    """The end of the one `serve` that was given it, once somebody asks.

    From then on no client is taken in any more. Each one that is there hears its REQ interrupt at once and
    again every `REPEAT_S` seconds, until it has left (vfio_pci_core_request). When the last one has left,
    `serve` returns. Nothing bounds the wait but whoever asked: cancel `serve` to end it at once.
    """

    def __init__(self) -> None:
        self._asked = trio.Event()
        self._waiting: set[trio.CancelScope] = set()
        self._attached: list[PciFunction] = []  # in the order in which their clients came

    @property
    def asked(self) -> bool:
        """Whether `ask` was called."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Begin. From the trio thread; asking again changes nothing."""
        self._asked.set()
        for scope in self._waiting:
            scope.cancel()

    async def unless_asked(self, wait: Callable[[], Awaitable[_T]]) -> _T | None:
        """What ``wait`` gives; None, and ``wait`` cancelled, if somebody asks before."""
        with trio.CancelScope() as scope:
            if self.asked:
                scope.cancel()
            self._waiting.add(scope)
            try:
                return await wait()
            finally:
                self._waiting.discard(scope)
        return None

    @contextmanager
    def attached(self, function: PciFunction) -> Iterator[None]:
        """While ``function`` has a client."""
        self._attached.append(function)
        try:
            yield
        finally:
            self._attached.remove(function)

    async def relay(self) -> None:
        """Once somebody has asked, ask all clients, until cancelled."""
        await self._asked.wait()
        for function in self._attached:
            if function.request_release():
                log.info("%s: client asked to let go", function.name)
            else:
                log.warning("%s: its client cannot be asked to let go (no REQ); waiting", function.name)
        while True:
            await trio.sleep(REPEAT_S)
            for function in self._attached:
                if function.request_release():
                    log.info("%s: client asked to let go again", function.name)
