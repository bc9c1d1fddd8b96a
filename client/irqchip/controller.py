"""The machine's interrupt controller as its PCI devices see it: the irqchip of the moment, and four routes.

Both can change while devices are in use: firmware and operating system agree on another irqchip (a POWER
guest goes from XICS to XIVE when it has said what it understands), a kernel programs the router. A device
that has wired its line straight into the irqchip must hear of it: `irqchip_change` and `routing_change`
tell.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

import trio

from client.errors import ClientError
from client.irqchip.chip import Irqchip, IrqchipError
from client.irqchip.notifier import Notifier
from client.irqchip.routes import LINES, NOWHERE, IntxMode, IntxRoute


class InterruptController:
    """Starts with `chip` active and `routes` for INTA to INTD of the root bus; lines without one go nowhere.

    Devices that drive a line by its level do so with `assert_line` and `deassert_line`, which follow chip and
    routes by themselves; several may share a line.
    """

    def __init__(self, chip: Irqchip, routes: Sequence[IntxRoute] = ()) -> None:
        if len(routes) > LINES:
            raise ClientError(f"{len(routes)} routes: the root bus has {LINES} lines")
        self.irqchip_change: Final = Notifier("irqchip change")
        """Told after another irqchip became the active one, whatever became of the routes."""
        self.routing_change: Final = Notifier("interrupt routing change")
        """Told after routes were set; whether one's own is another is for the subscriber to see."""
        self._chip = chip
        self._routes = [*routes, *[NOWHERE] * (LINES - len(routes))]
        self._asserting: list[set[Hashable]] = [set() for _ in range(LINES)]
        self._driven: set[int] = set()  # the inputs that are high because of us
        self._changing = trio.Lock()
        chip.activate()
        self._drive()

    @property
    def chip(self) -> Irqchip:
        """The active irqchip."""
        return self._chip

    def route(self, line: int) -> IntxRoute:
        """Where a line of the root bus goes."""
        return self._routes[line]

    async def activate(self, chip: Irqchip) -> None:
        """Make another irqchip the active one, and tell everybody; the one that is active already changes
        nothing.

        Raises IrqchipError if it cannot be activated; the old one stays then. Once it is active the change
        is not given up by a cancellation.
        """
        async with self._changing:
            old = self._chip
            if chip is old:
                return
            self._let_go()
            old.deactivate()
            try:
                chip.activate()
            except IrqchipError:
                old.activate()
                self._drive()
                raise
            self._chip = chip
            self._drive()
            await self.irqchip_change.notify()

    async def set_route(self, line: int, route: IntxRoute) -> None:
        """Send a line somewhere else, and tell everybody; also if it goes where it went before."""
        async with self._changing:
            self._routes[line] = route
            self._drive()
            await self.routing_change.notify()

    def assert_line(self, line: int, device: Hashable) -> None:
        """`device` drives the line; it is high while anybody does."""
        self._asserting[line].add(device)
        self._drive()

    def deassert_line(self, line: int, device: Hashable) -> None:
        """`device` does not drive the line, or no longer."""
        self._asserting[line].discard(device)
        self._drive()

    def _drive(self) -> None:
        """Give the inputs the levels of the lines that go there."""
        high = set()
        for asserting, route in zip(self._asserting, self._routes, strict=True):
            if route.mode is not IntxMode.DISABLED and bool(asserting) != (route.mode is IntxMode.INVERTED):
                high.add(route.gsi)
        for gsi in self._driven - high:
            self._driven.discard(gsi)
            self._chip.set_level(gsi, False)
        for gsi in high - self._driven:
            self._chip.set_level(gsi, True)
            self._driven.add(gsi)

    def _let_go(self) -> None:
        for gsi in self._driven:
            self._chip.set_level(gsi, False)
        self._driven.clear()
