"""From the card's interrupts to `vfu_irq_trigger`.

The library keeps one array of eventfds for INTx, MSI and MSI-X and writes to them when it is told, in the
thread that handles its messages only. So the card gets eventfds of this module, as if they were a client's,
and a task passes on what arrives there. Which kind is wired follows the enable bits in configuration space.

An interrupt for which the client has no eventfd yet waits: it is tried again after each message.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable
from contextlib import suppress

import trio

from device.function import IrqKind, PciFunction
from server.libvfio_user._told import Told
from server.libvfio_user.library import LibraryError

__all__ = ["Bridge"]

_KINDS = (IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX)


class Bridge:
    """Passes on the interrupts of ``function`` by ``trigger(number)``, which raises `LibraryError`."""

    def __init__(self, function: PciFunction, trigger: Callable[[int], object], told: Told) -> None:
        self._function = function
        self._trigger = trigger
        self._told = told
        self._counts = {kind: irq.count for kind, irq in zip(IrqKind, function.irqs(), strict=True)}
        self._kind: IrqKind | None = None
        self._waiting: set[int] = set()
        self._epoll = select.epoll()
        self._vectors: dict[int, int] = {}  # eventfd -> its number
        try:
            for number in range(max(self._counts[kind] for kind in _KINDS)):
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._vectors[fd] = number
                self._epoll.register(fd, select.EPOLLIN)
        except OSError:
            self.close()
            raise

    def follow(self) -> None:
        """Wire the kind that configuration space says now, and try again what waits."""
        interrupts = self._function.interrupts
        if interrupts.msix.enabled:
            kind = IrqKind.MSIX
        elif interrupts.msi.enabled:
            kind = IrqKind.MSI
        else:
            kind = IrqKind.INTX
        if kind is not self._kind:
            self._wire(kind)
        elif self._waiting:
            for number in sorted(self._waiting):
                self._pass_on(number)

    def _wire(self, kind: IrqKind) -> None:
        if self._kind is not None and self._counts[self._kind]:
            self._function.irq_disable(self._kind)
        for fd, _ in self._epoll.poll(0):
            os.eventfd_read(fd)  # an interrupt of one kind must not become one of another
        self._waiting.clear()
        self._kind = kind
        if self._counts[kind]:
            self._function.irq_set_trigger(kind, 0, list(self._vectors)[: self._counts[kind]])

    async def run(self) -> None:
        """Pass on interrupts until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._epoll)
            for fd, _ in self._epoll.poll(0):
                with suppress(BlockingIOError):
                    os.eventfd_read(fd)
                    self._pass_on(self._vectors[fd])
            await trio.lowlevel.checkpoint()

    def _pass_on(self, number: int) -> None:
        self._waiting.discard(number)
        if self._kind is IrqKind.INTX and not self._function.interrupts.lines.intx_asserted:
            # It went low before anybody heard of it. Nobody will unmask what nobody heard.
            self._function.irq_unmask(IrqKind.INTX, 0, [True])
            return
        try:
            self._trigger(number)
        except LibraryError as error:
            if error.errno != errno.ENOENT:
                self._told(f"interrupt {number} does not reach the client: {error}")
            elif self._kind is IrqKind.MSI and number:
                self._pass_on(0)  # fewer vectors are wired than the card has: the first stands for all
            else:
                self._waiting.add(number)

    def close(self) -> None:
        """Let go of the eventfds; the card has copies of its own."""
        self._epoll.close()
        for fd in self._vectors:
            os.close(fd)
        self._vectors.clear()
