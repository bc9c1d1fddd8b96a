"""Telling those who asked that something about the machine changed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import trio

Subscriber = Callable[[], Awaitable[None]]


class _Round:
    """One change, which not everybody may have been told of yet."""

    __slots__ = ("notifier", "over")

    def __init__(self, notifier: Notifier) -> None:
        self.notifier: Final = notifier
        self.over = False


_ROUNDS: Final[ContextVar[tuple[_Round, ...]]] = ContextVar("rounds", default=())
"""Those that the task has been told in, or whoever started it."""


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

    @property
    def telling_caller(self) -> bool:
        """Whether the calling task is a subscriber at work, or was started by one, while not everybody has
        finished. If it waited for the next change it would wait for itself.
        """
        return any(each.notifier is self and not each.over for each in _ROUNDS.get())

    async def notify(self) -> None:
        """Tell everybody who is subscribed now, all at a time: one that waits for its server holds up nobody
        else.

        A change that has happened cannot be kept from anybody: cancellation waits until all have been told,
        and so does an exception of one of them; what they raised comes as an ExceptionGroup (or
        BaseExceptionGroup).
        """
        failures: list[BaseException] = []

        async def tell(subscriber: Subscriber) -> None:
            try:
                await subscriber()
            except trio.Cancelled:
                raise
            except BaseException as error:
                failures.append(error)

        this = _Round(self)
        token = _ROUNDS.set((*_ROUNDS.get(), this))
        try:
            with trio.CancelScope(shield=True):
                async with trio.open_nursery() as nursery:
                    for subscriber in self._subscribers:
                        nursery.start_soon(tell, subscriber)
        finally:
            this.over = True
            _ROUNDS.reset(token)
        if failures:
            raise BaseExceptionGroup(f"{self.what}: not everybody could follow", failures)
