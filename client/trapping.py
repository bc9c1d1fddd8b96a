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
        self.begun = 0
        """How many accesses have begun; the number of the last one."""
        self.over = False
        """Whether the session has ended, and with it all accesses."""
        self._subscribers: list[Callable[[int], None]] = []

    def __len__(self) -> int:
        return len(self._subscribers)

    @contextmanager
    def subscribed(self, subscriber: Callable[[int], None]) -> Iterator[None]:
        """Call `subscriber` with its number after each access of a `client.Bar` by message, until the block
        ends.
        """
        self._subscribers.append(subscriber)
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)

    def begin(self) -> int:
        """A BAR is about to be accessed by message; the number of this access."""
        self.begun += 1
        return self.begun

    def done(self, number: int) -> None:
        """It was: a read is answered, a write as well or, if it is posted, on its way."""
        for subscriber in tuple(self._subscribers):
            subscriber(number)

    def end(self) -> None:
        """No access is possible any more; subscribers are told as if there had been one."""
        self.over = True
        self.done(self.begin())
