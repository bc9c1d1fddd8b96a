"""The slow path of INTx: we hear of the interrupt, drive the line by its level, and see the driver's next
access to a BAR as the end of it (hw/vfio/pci.c: vfio_intx_interrupt, vfio_intx_eoi, vfio_intx_mmap_enable).

BARs are not mapped while an interrupt is pending and for a while afterwards, lest that access go unseen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import trio

from client._eventfd import take
from client.errors import ClientError
from client.trapping import Trapping
from protocol.limits import INTX_MAPPINGS_OFF


@dataclass(slots=True)
class IntxCounters:
    """What became of a line.

    `changes`: of irqchip or route that it followed; `fallbacks`: changes, and times it was enabled or
    reconnected, after which the slow path was all it had although the fast one was wanted; `triggers`:
    interrupts heard on the slow path, of which `merged` came while one was pending; `drained`: interrupts
    heard by nobody, because UNMASK says them again or the line was given up; `ends`: UNMASK messages for the
    end of one.
    """

    changes: int = 0
    fallbacks: int = 0
    triggers: int = 0
    merged: int = 0
    drained: int = 0
    ends: int = 0


class SlowPath:
    """Drives the line by `drive`. At an end of interrupt `unmask` is run as a task of `nursery`, unless one
    waits already; it is to send UNMASK if `owed` still says so.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        counters: IntxCounters,
        drive: Callable[[bool], None],
        unmask: Callable[[], Awaitable[None]],
    ) -> None:
        self.pending = False
        self.owed = False
        self._nursery: Final = nursery
        self._counters: Final = counters
        self._drive: Final = drive
        self._unmask: Final = unmask
        self._heard_at = 0  # the number of the last access that began before the last interrupt was heard
        self._listening = trio.CancelScope()
        self._trapping = Trapping()
        self._subscription = ExitStack()
        self._quiet_from = 0.0
        self._resting = trio.CancelScope()

    def watch(self, trapping: Trapping) -> None:
        """Take accesses to these BARs for the end of interrupt, and no others any more. They are nobody
        else's: see `check_free`.
        """
        self.unwatch()
        self._trapping = trapping
        self._subscription.enter_context(trapping.subscribed(self._accessed))

    def unwatch(self) -> None:
        """Take no access for that; mappings are used again."""
        self._resting.cancel()
        self._trapping.mapped = True
        self._subscription.close()
        self._trapping = Trapping()

    def check_free(self, trapping: Trapping) -> None:
        """Raises ClientError if another line takes accesses to these BARs for its own."""
        if trapping is not self._trapping and len(trapping):
            raise ClientError("another line of this session is in use")

    def listen(self, fd: int) -> None:
        """Hear of interrupts by this eventfd, from those on that it has counted."""
        self.deafen()
        self._listening = trio.CancelScope()
        self._nursery.start_soon(self._hear, fd, self._listening)

    def deafen(self) -> None:
        """Hear nothing; the eventfd is not touched any more when this returns."""
        self._listening.cancel()

    def clear(self) -> bool:
        """Forget the interrupt that is pending, and the UNMASK that is owed; whether one was pending."""
        pending, self.pending = self.pending, False
        self.owed = False
        self._drive(False)
        return pending

    async def _hear(self, fd: int, listening: trio.CancelScope) -> None:
        with listening:
            while not listening.cancel_called:
                await trio.lowlevel.wait_readable(fd)
                if not listening.cancel_called and (count := take(fd)):
                    self._interrupted(count)

    def _interrupted(self, count: int) -> None:
        self._counters.triggers += count
        self._counters.merged += count - (not self.pending)
        self.pending = True
        self._heard_at = self._trapping.begun
        self._drive(not self._trapping.over)
        self._quiet_from = trio.current_time() + INTX_MAPPINGS_OFF
        if self._trapping.mapped:
            self._trapping.mapped = False
            self._resting = trio.CancelScope()
            self._nursery.start_soon(self._map_again, self._trapping, self._resting)

    async def _map_again(self, trapping: Trapping, resting: trio.CancelScope) -> None:
        with resting:
            while True:
                await trio.sleep_until(self._quiet_from)
                if self.pending:
                    self._quiet_from = trio.current_time() + INTX_MAPPINGS_OFF
                elif trio.current_time() >= self._quiet_from:
                    trapping.mapped = True
                    return

    def _accessed(self, number: int) -> None:
        """End what is pending, unless the access was under way already when that was heard: it may have been
        too early to see the reason, and the driver, whose line stays high, comes again.

        When the session is over nobody can end it. The line falls, lest a CPU do nothing but try.
        """
        if self._trapping.over:
            self._drive(False)
        elif self.pending and number > self._heard_at:
            self.pending = False
            owed, self.owed = self.owed, True
            self._drive(False)
            if not owed:
                self._nursery.start_soon(self._unmask)
