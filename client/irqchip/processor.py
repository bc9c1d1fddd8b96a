"""A CPU for the irqchips that are modelled here: it runs the handlers of a driver that is in this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, NoReturn

import trio

from client._nursery import background
from client.irqchip.controller import InterruptController
from client.irqchip.routes import LINES, IntxMode
from client.irqchip.userspace.chip import UserspaceChip

Handler = Callable[[], Awaitable[bool]]
"""Handles an interrupt of a device; whether it was that device's (Linux's IRQ_HANDLED)."""


@dataclass(slots=True)
class HandlingCounters:
    """What became of the interrupts of one input."""

    handled: int = 0
    """A handler said it was its device's."""
    spurious: int = 0
    """No handler did, or there was none."""


class Processor:
    """Takes the interrupts of the active irqchip, the highest priority first, and runs one handler at a time:
    one that waits for a device which does not answer keeps all others waiting, as on any CPU.

    An interrupt is ended at the irqchip that it came from, whatever its handlers did. While the active
    irqchip is not a `UserspaceChip` it has a CPU elsewhere, and this one rests.
    """

    def __init__(self, controller: InterruptController) -> None:
        self.controller: Final = controller
        self.counters: Final[defaultdict[int, HandlingCounters]] = defaultdict(HandlingCounters)
        """Of each input that interrupted."""
        self.handled = 0
        """Interrupts that a handler knew."""
        self.spurious = 0
        """Interrupts that were nobody's, and those that the irqchip had taken back when it was asked."""
        self._handlers: list[list[Handler]] = [[] for _ in range(LINES)]
        self._rest = trio.CancelScope()

    @contextmanager
    def handling(self, line: int, handler: Handler) -> Iterator[None]:
        """Call `handler` for interrupts of a line of the root bus until the block ends, whichever irqchip is
        active and wherever the line is routed by then. All that share the input are called, those of one line
        in the order in which they came. Raises ClientError for a line that is none.
        """
        self.controller.route(line)
        self._handlers[line].append(handler)
        try:
            yield
        finally:
            self._handlers[line].remove(handler)

    async def run(self) -> NoReturn:
        """Work; what a handler raises ends this, after the interrupt was ended."""
        with self.controller.irqchip_change.subscribed(self._irqchip_changed):
            while True:
                with trio.CancelScope() as self._rest:
                    await self._interrupted(self.controller.chip)
                await self._interrupt(self.controller.chip)

    async def _irqchip_changed(self) -> None:
        self._rest.cancel()

    @staticmethod
    async def _interrupted(chip: object) -> None:
        if isinstance(chip, UserspaceChip):
            await chip.wait()
        else:
            await trio.sleep_forever()

    async def _interrupt(self, chip: object) -> None:
        if not isinstance(chip, UserspaceChip) or not chip.asks:
            return
        delivery = chip.acknowledge()
        if delivery is None:
            self.spurious += 1
            return
        try:
            known = await self._handle(delivery.gsi)
        finally:
            chip.end(delivery)
        counters = self.counters[delivery.gsi]
        if known:
            self.handled += 1
            counters.handled += 1
        else:
            self.spurious += 1
            counters.spurious += 1

    async def _handle(self, gsi: int) -> bool:
        known = False
        for handlers, handler in tuple(self._sharing(gsi)):
            if handler in handlers:  # or its block has ended while another was at work
                known |= await handler()
        return known

    def _sharing(self, gsi: int) -> Iterator[tuple[list[Handler], Handler]]:
        """The handlers of lines that are routed to an input now, each with those of its line."""
        for line, handlers in enumerate(self._handlers):
            route = self.controller.route(line)
            if route.mode is not IntxMode.DISABLED and route.gsi == gsi:
                yield from ((handlers, handler) for handler in handlers)


@asynccontextmanager
async def open_processor(controller: InterruptController) -> AsyncIterator[Processor]:
    """A CPU that works for as long as the block.

    async with open_processor(controller) as cpu:
        with cpu.handling(intx.line, handler):
            ...

    What a handler raises ends the block, and comes out of it.
    """
    processor = Processor(controller)
    async with background() as nursery:
        nursery.start_soon(processor.run)
        yield processor
