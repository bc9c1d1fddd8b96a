"""What an INTx line says to its server while it changes."""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Final

import trio

from client.errors import ClientError
from client.interrupts import act, unwire, wire, wire_unmask
from client.session import Session
from protocol.limits import INTX_TIMEOUT
from protocol.vfio import IrqIndex, IrqSetFlags


class IntxRequests:
    """The messages of one change, which must all be answered within `INTX_TIMEOUT` from now on.

    Each raises ServerError if it is refused, Disconnected, and ClientError for want of an answer. Afterwards
    messages are still sent, so that a server which wakes up finds the line as it should be, but not waited
    for.
    """

    def __init__(self, session: Session) -> None:
        self.session: Final = session
        self.late = False
        """Whether one of them was not answered in time."""
        self._deadline = trio.current_time() + INTX_TIMEOUT
        self._act = partial(act, session, IrqIndex.INTX, 0)

    async def wire(self, trigger_fd: int) -> None:
        """Signal interrupts there."""
        await self._ask("TRIGGER eventfd", wire(self.session, IrqIndex.INTX, 0, (trigger_fd,)))

    async def unwire(self) -> None:
        """Signal them nowhere."""
        await self._ask("TRIGGER none", unwire(self.session, IrqIndex.INTX))

    async def mask(self) -> None:
        """Hold the line back: once this is answered nothing is signalled."""
        await self._ask("MASK", self._act(IrqSetFlags.ACTION_MASK))

    async def unmask(self) -> None:
        """Let it speak: a line that is high signals, again if need be."""
        await self._ask("UNMASK", self._act(IrqSetFlags.ACTION_UNMASK))

    async def wire_unmask(self, resample_fd: int) -> None:
        """Do as `unmask` whenever this eventfd is signalled."""
        await self._ask("UNMASK eventfd", wire_unmask(self.session, resample_fd))

    async def _ask(self, what: str, request: Coroutine[object, object, None]) -> None:
        with trio.CancelScope(deadline=self._deadline) as scope:
            await request
        if scope.cancelled_caught:
            self.late = True
            raise ClientError(f"INTx: the server does not answer {what} within {INTX_TIMEOUT} s")
