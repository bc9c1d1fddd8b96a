"""What ties a driver to the device behind one session: registers, interrupts, doorbells. A driver that moves
to another session leaves one attachment for another; its rings are in memory and stay.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Final, ParamSpec, Self

import trio

from client.errors import ClientError, DeviceError
from client.interrupts import Interrupt, IntxLine, intx, msix
from client.irqchip.intx import Intx, open_intx
from client.irqchip.processor import Processor
from client.pci import Command, ConfigSpace, PciControl, read_config
from client.session import Session
from client.virtio.transport import NO_VECTOR, Doorbells, Isr, VirtioPci, plan_vectors
from protocol.vfio import IrqIndex

P = ParamSpec("P")

STOP_TIMEOUT: Final = 2.0
"""Seconds that a device gets to stop when the block of `open_net` ends by an exception or a cancellation."""


class Wiring(Enum):
    """Which interrupts the driver uses."""

    MSIX = "msix"
    INTX = "intx"


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a card is plugged in: slot `number` of the root bus of a machine whose irqchip may change, and
    the processor that takes the card's INTx there.
    """

    cpu: Processor
    number: int = 0


async def quietly(function: Callable[P, Awaitable[None]], *args: P.args, **kwargs: P.kwargs) -> None:
    """A farewell to the device: bounded in time, and nobody is left to hear of a failure."""
    with trio.move_on_after(STOP_TIMEOUT, shield=True), suppress(ClientError):
        await function(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Listener:
    """Whom to tell of interrupts: which queues may have something and how many interrupts said so, that the
    configuration changed, and why nothing more is heard.
    """

    interrupted: Callable[[Sequence[int], int], None]
    config_changed: Callable[[], Awaitable[None]]
    failed: Callable[[ClientError], None]


@dataclass(eq=False)
class Attachment:
    """Made by `open`, ended by `close`. `vectors` are (that of the configuration, those of the queues)."""

    session: Session
    wiring: Wiring
    doorbells: Doorbells
    config: ConfigSpace
    transport: VirtioPci
    slot: Slot | None = None
    interrupts: tuple[Interrupt, ...] = ()
    line: Intx | None = None
    vectors: tuple[int, list[int]] = (NO_VECTOR, [])
    _holding: trio.CancelScope = field(default_factory=trio.CancelScope)
    _released: trio.Event = field(default_factory=trio.Event)
    _listening: trio.CancelScope = field(default_factory=trio.CancelScope)
    _silent: trio.Event | None = None
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @classmethod
    async def open(cls, session: Session, wiring: Wiring, doorbells: Doorbells, slot: Slot | None) -> Self:
        """Find the registers and let the device reach memory; raises DeviceError if it has no such
        registers. With `slot` INTx goes through that machine's irqchip.
        """
        config = await read_config(session)
        transport = VirtioPci(session, config, map_doorbells=doorbells == "mapped")
        try:
            if doorbells == "eventfd":
                await transport.use_eventfds()
            pci = PciControl(session, config)
            for bits, on in (
                (Command.MEMORY | Command.MASTER, True),
                (Command.INTX_DISABLE, wiring is Wiring.MSIX),
            ):
                if config.command & bits != (bits if on else 0):
                    await pci.set_command(bits, on=on)
        except BaseException:
            transport.close()
            raise
        attachment = cls(session, wiring, doorbells, config, transport, slot)
        attachment._stack.enter_context(transport)
        return attachment

    async def wire(self, queues: int, nursery: trio.Nursery) -> None:
        """Wire the interrupts of so many queues, with a task of `nursery` for what an irqchip needs. Raises
        ClientError if there are too few vectors, or no INTx.
        """
        if self.wiring is Wiring.INTX:
            self.vectors = NO_VECTOR, [NO_VECTOR] * queues
            if self.slot is None:
                self.interrupts = (await self._stack.enter_async_context(intx(self.session)),)
                return
            self.line = await nursery.start(self._hold_line, self.slot)
            self._stack.push_async_callback(self._release_line)
            return
        self.vectors = _plan(self.session, queues)
        pci = PciControl(self.session, self.config)
        await pci.set_msix(enabled=True)
        self._stack.push_async_callback(quietly, pci.set_msix, enabled=False)
        count = max(self.vectors[0], *self.vectors[1]) + 1
        self.interrupts = await self._stack.enter_async_context(msix(self.session, count))

    async def _hold_line(self, slot: Slot, task_status: trio.TaskStatus[Intx]) -> None:
        try:
            with self._holding:
                async with open_intx(self.session, slot.cpu.controller, slot=slot.number) as line:
                    await line.enable()
                    task_status.started(line)
                    await trio.sleep_forever()
        finally:
            self._released.set()

    async def _release_line(self) -> None:
        self._holding.cancel()
        with trio.CancelScope(shield=True):
            await self._released.wait()

    def check_fits(self, session: Session) -> None:
        """Raises DeviceError if the device behind another session has not the vectors that are set here."""
        if self.wiring is Wiring.MSIX and _plan(session, len(self.vectors[1])) != self.vectors:
            raise DeviceError("the device has fewer vectors than the one before")

    def listen(self, nursery: trio.Nursery, listener: Listener) -> None:
        """Start the background tasks that hear what the device says; once."""
        self._silent = trio.Event()
        nursery.start_soon(self._listen, listener, self._silent)

    async def _listen(self, listener: Listener, silent: trio.Event) -> None:
        try:
            with self._listening:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._hear, self._listen_session, listener)
                    if self.slot is not None and self.line is not None:
                        nursery.start_soon(
                            self._hear, partial(self._handle, self.slot.cpu, self.line), listener
                        )
                    for interrupt in self.interrupts:
                        listen = self._intx if isinstance(interrupt, IntxLine) else self._msix
                        nursery.start_soon(self._hear, partial(listen, interrupt), listener)
        finally:
            silent.set()

    async def _hear(self, listen: Callable[[Listener], Awaitable[None]], listener: Listener) -> None:
        try:
            await listen(listener)
        except ClientError as error:
            self._failed(listener, error)

    def _failed(self, listener: Listener, error: ClientError) -> None:
        """Whoever hears no more is not told either, though it may have happened before."""
        if not self._listening.cancel_called:
            listener.failed(error)

    async def _msix(self, interrupt: Interrupt, listener: Listener) -> None:
        queues = [queue for queue, vector in enumerate(self.vectors[1]) if vector == interrupt.vector]
        while True:
            listener.interrupted(queues, await interrupt.wait())
            if interrupt.vector != self.vectors[0]:
                continue
            # the ISR tells a configuration change even with MSI-X (virtio 1.3, 4.1.4.5.1)
            if not queues or Isr.CONFIG in await self.transport.isr():
                await listener.config_changed()

    async def _intx(self, line: Interrupt, listener: Listener) -> None:
        """The ISR says what happened and takes the line down, then it is unmasked: once before the first
        interrupt as well, which a device that was moved may have sent to another.
        """
        count = 0
        while True:
            await self._service(listener, count)
            await line.unmask()
            count = await line.wait()

    async def _handle(self, cpu: Processor, line: Intx, listener: Listener) -> None:
        """As `_intx`, where the processor calls and the irqchip sees to the unmasking. A call that is under
        way at the end is given up, for the processor does nothing else before it returns.
        """
        under_way = trio.CancelScope()

        async def handler() -> bool:
            nonlocal under_way
            isr = Isr(0)
            with trio.CancelScope() as under_way:
                try:
                    isr = await self._service(listener, 0)
                except ClientError as error:
                    self._failed(listener, error)
            if isr:
                listener.interrupted((), 1)
            return bool(isr)

        assert line.line is not None
        try:
            with cpu.handling(line.line, handler):
                await self._service(listener, 0)
                await trio.sleep_forever()
        finally:
            under_way.cancel()

    async def _service(self, listener: Listener, count: int) -> Isr:
        """Pass on what the ISR says, on behalf of so many interrupts."""
        isr = await self.transport.isr()
        listener.interrupted(range(len(self.vectors[1])) if Isr.QUEUE in isr else (), count)
        if Isr.CONFIG in isr:
            await listener.config_changed()
        return isr

    async def _listen_session(self, listener: Listener) -> None:
        """No interrupt comes when the server is gone."""
        self._failed(listener, await self.session.wait_end())

    async def close(self) -> None:
        """Hear no more, unwire the interrupts and unmap the doorbells."""
        self._listening.cancel()
        if self._silent is not None:
            with trio.CancelScope(shield=True):
                await self._silent.wait()
        await self._stack.aclose()


def _plan(session: Session, queues: int) -> tuple[int, list[int]]:
    available = session.irqs[IrqIndex.MSIX].count if len(session.irqs) > IrqIndex.MSIX else 0
    return plan_vectors(available, queues)
