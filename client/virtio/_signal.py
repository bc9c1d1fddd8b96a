"""What interrupt tasks use to wake the tasks that wait for a queue."""

from __future__ import annotations

import trio


class Signal:
    """Remembers one `set` until somebody waits; wakes all who wait. A waiter must look again: it may be
    woken for nothing.
    """

    def __init__(self) -> None:
        self._lot = trio.lowlevel.ParkingLot()
        self._is_set = False

    def set(self) -> None:
        """Wake everyone, or the next to come."""
        self._is_set = True
        self._lot.unpark_all()

    def clear(self) -> None:
        """Forget a `set` that nobody waited for."""
        self._is_set = False

    async def wait(self) -> None:
        """Until `set`, or at once if it was called since the last wait."""
        if self._is_set:
            await trio.lowlevel.checkpoint()
        else:
            await self._lot.park()
        self._is_set = False
