"""The machine's interrupt controller as its PCI devices see it: the irqchip of the moment, and four routes.

Both can change while devices are in use: firmware and operating system agree on another irqchip (a POWER
guest goes from XICS to XIVE when it has said what it understands), a kernel programs the router. A device
that has wired its line straight into the irqchip must hear of it: `irqchip_change` and `routing_change`
tell.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from client.errors import ClientError
from client.irqchip.chip import Irqchip, IrqchipError
from client.irqchip.notifier import Notifier
from client.irqchip.routes import LINES, NOWHERE, IntxMode, IntxRoute


class InterruptController:
    """Starts with `chip` active and `routes` for INTA to INTD of the root bus; lines without one go nowhere.

    Devices that drive a line by its level do so with `assert_line` and `deassert_line`, which follow chip and
    routes by themselves; several may share a line, and several lines an input. Whoever names a line that is
    none gets ClientError, and IrqchipError(EINVAL) where a route would lead to an input that the active
    irqchip does not have: nothing has changed then.
    """

    def __init__(self, chip: Irqchip, routes: Sequence[IntxRoute] = ()) -> None:
        if len(routes) > LINES:
            raise ClientError(f"{len(routes)} routes: the root bus has {LINES} lines")
        _check_inputs(chip, routes)
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
        return self._routes[_checked(line)]

    async def activate(self, chip: Irqchip) -> None:
        """Make another irqchip the active one, and tell everybody; the one that is active already changes
        nothing.

        Raises IrqchipError if it cannot be activated, has too few inputs for the routes, or the old one
        cannot be left: that stays then, and nobody is told. Once it is active the change is not given up by
        a cancellation, and stays even if subscribers fail (ExceptionGroup). Subscribers cannot call this:
        ClientError.
        """
        async with self._change():
            old = self._chip
            if chip is old:
                return
            _check_inputs(chip, self._routes)
            try:
                self._let_go()
                old.deactivate()
                chip.activate()
            except BaseException:
                old.activate()
                self._drive()
                raise
            self._chip = chip
            await self._follow(self.irqchip_change)

    async def set_route(self, line: int, route: IntxRoute) -> None:
        """Send a line somewhere else, and tell everybody; also if it goes where it went before.

        Raises IrqchipError for an input that the active irqchip does not have. What is said of cancellation
        and subscribers at `activate` is true here as well.
        """
        async with self._change():
            _check_inputs(self._chip, (route,))
            self._routes[_checked(line)] = route
            await self._follow(self.routing_change)

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        for notifier in (self.irqchip_change, self.routing_change):
            if notifier.telling_caller:
                raise ClientError(f"a subscriber to {notifier.what} wants a change before all have followed")
        async with self._changing:
            yield

    async def _follow(self, change: Notifier) -> None:
        """Levels and devices follow what has changed, the latter even if an input refuses its level."""
        try:
            self._drive()
        finally:
            await change.notify()

    def assert_line(self, line: int, device: Hashable) -> None:
        """`device` drives the line; it is high while anybody does."""
        self._asserting[_checked(line)].add(device)
        self._drive()

    def deassert_line(self, line: int, device: Hashable) -> None:
        """`device` does not drive the line, or no longer."""
        self._asserting[_checked(line)].discard(device)
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
        while self._driven:
            self._chip.set_level(self._driven.pop(), False)


def _checked(line: int) -> int:
    if not 0 <= line < LINES:
        raise ClientError(f"line {line}: the root bus has 0 to {LINES - 1}")
    return line


def _check_inputs(chip: Irqchip, routes: Iterable[IntxRoute]) -> None:
    for route in routes:
        if route.mode is not IntxMode.DISABLED and not chip.has_input(route.gsi):
            raise IrqchipError(f"{chip.name}: a route to input {route.gsi} of {chip.inputs}", errno.EINVAL)
