"""The eventfd with which a client says that an interrupt was handled, watched while the device has it.

The descriptor that is watched is this module's own copy. The device closes its one when it likes, and a
closed descriptor cannot be taken out of epoll any more while the client holds the same file open.
"""

from __future__ import annotations

import errno
import os
import select
from typing import Final

import trio

from device.errors import DeviceError
from device.function import IrqKind, PciFunction
from protocol import Command, Request
from protocol.messages import SetIrqs

__all__ = ["MOST_IN_A_ROW", "REST_S", "Resample"]

# Readings after each of which the eventfd is readable again at once. A guest needs longer to end an
# interrupt; a semaphore that was filled, or the line's own trigger, would have us read for ever.
MOST_IN_A_ROW: Final = 16
# Seconds of rest then, for the sake of the other cards: such a client costs them next to nothing.
REST_S: Final = 0.01


class Resample:
    """Keeps one task of ``nursery`` waiting for what ``function`` wants to be told of, or none."""

    def __init__(self, function: PciFunction, nursery: trio.Nursery) -> None:
        self._function = function
        self._nursery = nursery
        self._watched: trio.CancelScope | None = None

    def follow(self, request: Request) -> None:
        """Call after ``request`` was handled: from then on what the device has now is watched.

        DeviceError if no descriptor is left to watch with; the device then has no such eventfd any more.
        """
        if request.command is not Command.DEVICE_SET_IRQS:
            return
        if not isinstance(request.body, SetIrqs) or request.body.index != IrqKind.INTX:
            return
        if self._watched is not None:
            self._watched.cancel()
            self._watched = None
        if self._function.unmask_fd is not None:
            try:
                fd = os.dup(self._function.unmask_fd)
            except OSError as error:
                self._function.irq_set_unmask_fd(IrqKind.INTX, None)
                raise DeviceError(
                    error.errno or errno.EMFILE, "no descriptor is free to watch INTx"
                ) from error
            self._watched = trio.CancelScope()
            self._nursery.start_soon(self._watch, fd, self._watched)

    async def _watch(self, fd: int, scope: trio.CancelScope) -> None:
        again = select.poll()
        again.register(fd, select.POLLIN)
        in_a_row = 0
        try:
            with scope:
                while self._function.unmask_fd is not None:
                    await trio.lowlevel.wait_readable(fd)
                    if not scope.cancel_called:
                        self._function.unmask_fd_fired()
                        in_a_row = in_a_row + 1 if again.poll(0) else 0
                        if in_a_row == MOST_IN_A_ROW:
                            in_a_row = 0
                            await trio.sleep(REST_S)
        finally:
            trio.lowlevel.notify_closing(fd)
            os.close(fd)
