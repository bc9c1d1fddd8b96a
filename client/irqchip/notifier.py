"""Telling those who asked that something about the machine changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import trio

Subscriber = Callable[[], Awaitable[None]]


class Notifier:
    """A list of subscribers. A subscription lasts as long as its block, however that ends.

    with controller.irqchip_change.subscribed(line.irqchip_changed):
        ...
    """

    def __init__(self, what: str) -> None:
        self.what: Final = what
        self._subscribers: list[Subscriber] = []

    def __len__(self) -> int:
        return len(self._subscribers)

    @contextmanager
    def subscribed(self, subscriber: Subscriber) -> Iterator[None]:
        """Tell `subscriber` of every change until the block ends."""
        self._subscribers.append(subscriber)
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)

    async def notify(self) -> None:
        """Tell everybody who is subscribed now, all at a time: one that waits for its server holds up nobody
        else.

        A change that has happened cannot be kept from anybody: cancellation waits until all have been told,
        and so does an exception of one of them; what they raised comes as an ExceptionGroup.
        """
        failures: list[Exception] = []

        async def tell(subscriber: Subscriber) -> None:
            try:
                await subscriber()
            except Exception as error:
                failures.append(error)

        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                for subscriber in self._subscribers:
                    nursery.start_soon(tell, subscriber)
        if failures:
            raise ExceptionGroup(f"{self.what}: not everybody could follow", failures)
