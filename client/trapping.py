"""Who wants to know of accesses to a device's BARs, and whether those may go past the server.

A host that was told of a level-triggered interrupt by a plain eventfd does not see when its driver is done
with the device. It takes the BARs' mappings away, so that each access is a message it knows of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Trapping:
    """One session's. While `mapped` is false, every `client.Bar` of the session goes by message; mappings
    that others made of the regions are their own affair.
    """

    def __init__(self) -> None:
        self.mapped = True
        self._subscribers: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._subscribers)

    @contextmanager
    def subscribed(self, subscriber: Callable[[], None]) -> Iterator[None]:
        """Call `subscriber` after each access of a `client.Bar` by message, until the block ends."""
        self._subscribers.append(subscriber)
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)

    def accessed(self) -> None:
        """A BAR was accessed: a read is answered, a write as well or, if it is posted, on its way."""
        for subscriber in tuple(self._subscribers):
            subscriber()
