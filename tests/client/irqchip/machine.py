"""A machine with irqchips to choose from, a CPU led by the hand, and drivers of cards that share a line."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

import trio
import trio.testing

import client
from client.bars import Bar
from client.irqchip import InterruptController, IntxMode, IntxRoute, Irqchip, IrqchipError
from client.irqchip.intx import Intx, open_intx
from client.irqchip.userspace import Delivery, InputCounters, Ioapic, Pic, UserspaceChip
from protocol.vfio import RegionIndex
from tests.client.irqchip.card import ISR, MEMORY, REGISTERS, Card, Link

COMMAND: Final = 4
MEMORY_SPACE: Final = 1 << 1
MOST_INTERRUPTS: Final = 16
INTX_DISABLE: Final = 1 << 10
INITIATE_RESET: Final = 1 << 15


class Socketed(Irqchip):
    """An irqchip that notes who is attached to it, and may be one that cannot be used so."""

    def __init__(
        self,
        chip: UserspaceChip,
        name: str,
        *,
        resample: bool = True,
        attaches: bool = True,
        starts: bool = True,
    ) -> None:
        self.chip = chip
        self.name = name
        self.inputs = chip.inputs
        self.resample = resample
        self.starts = starts
        self.attaches = attaches
        self.active = False
        self.attached: list[tuple[int, int]] = []
        self.attachments = 0
        """How often anybody attached."""
        self.levels: set[int] = set()
        """Inputs that are driven high by their level."""

    def activate(self) -> None:
        assert not self.active
        if not self.starts:
            raise IrqchipError(f"{self.name}: activating it", errno.ENODEV)
        self.chip.activate()
        self.active = True

    def deactivate(self) -> None:
        assert self.active
        self.chip.deactivate()
        self.active = False

    def attach(self, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        assert self.active, "nobody attaches to an irqchip that is not in use"
        assert self.resample, "nor to one that signals no end of interrupt"
        if not self.attaches:
            raise IrqchipError(f"{self.name}: attaching to input {gsi}", errno.EBUSY)
        self.chip.attach(gsi, trigger_fd, resample_fd)
        self.attached.append((gsi, trigger_fd))
        self.attachments += 1

    def detach(self, gsi: int, trigger_fd: int) -> None:
        self.chip.detach(gsi, trigger_fd)
        if (gsi, trigger_fd) in self.attached:
            self.attached.remove((gsi, trigger_fd))

    def set_level(self, gsi: int, level: bool) -> None:
        self.chip.set_level(gsi, level)
        if level:
            self.levels.add(gsi)
        else:
            self.levels.discard(gsi)

    def has(self, trigger_fd: int) -> bool:
        """Whether this eventfd is attached."""
        return any(fd == trigger_fd for _, fd in self.attached)

    def holds(self, gsi: int) -> bool:
        """Whether there is an interrupt of this input that a CPU has yet to take, or to end."""
        if not 0 <= gsi < self.inputs:
            return False
        if isinstance(self.chip, Pic):
            pic = self.chip.state()
            return bool((pic.irr | pic.isr) >> gsi & 1)
        assert isinstance(self.chip, Ioapic)
        ioapic = self.chip.state()
        return bool((ioapic.local.irr | ioapic.local.isr) >> ioapic.entries[gsi].vector & 1)


class Driver:
    """Uses INTx of a card, or MSI-X; may lose its session and get another one."""

    def __init__(self, card: Card, *, thread: bool = False) -> None:
        self.card = card
        self._thread = thread
        self.line: Intx
        self.link: Link | None = None
        self.msix = False
        self.lost = False
        """The server has ended since the last `reconnect`."""
        self.silent_since: int | None = None
        """How many messages about INTx there had been when MSI-X came into use, if it is in use."""
        self._lock = trio.Lock()
        self._vectors = AsyncExitStack()
        self._bars: list[Bar] = []
        self._nursery: trio.Nursery

    @asynccontextmanager
    async def running(self, controller: InterruptController, *, bypass: bool = True) -> AsyncIterator[None]:
        """The line is open and enabled."""
        async with trio.open_nursery() as self._nursery:
            self.link = await self._connect()
            async with open_intx(self.link.session, controller, bypass=bypass) as self.line:
                await self.line.enable()
                yield
                await self._vectors.aclose()
            self._close_bars()
            if self.link is not None:
                await self.link.end()

    @property
    def listens(self) -> bool:
        """Whether the card's line is to be heard."""
        return not self.lost and not self.msix

    async def _connect(self) -> Link:
        link = Link(self.card, thread=self._thread)
        await self._nursery.start(link.run)
        self._bars = [Bar(link.session, REGISTERS), Bar(link.session, MEMORY)]
        return link

    def _close_bars(self) -> None:
        for bar in self._bars:
            bar.close()
        self._bars.clear()

    async def read_isr(self) -> bool:
        """Ask the card whether it wants something."""
        try:
            return bool(self._bars and await self._bars[0].read(ISR, 1))
        except client.Disconnected:
            return False

    async def touch(self) -> None:
        """Read memory of the card, which means nothing to it."""
        if self._bars:
            with suppress(client.Disconnected):
                await self._bars[1].read(0, 4)

    async def use_msix(self, on: bool) -> None:
        """MSI-X instead of INTx, or back."""
        async with self._lock:
            if self.link is None or self.msix == on:
                return
            try:
                if on:
                    await self.line.disable()
                    self.msix = True
                    self.silent_since = len(self.card.told)
                    await self._enter_msix()
                else:
                    await self._vectors.aclose()
                    self.msix = False
                    self.silent_since = None
                    await self.line.enable()
            except client.Disconnected:
                pass

    async def _enter_msix(self) -> None:
        assert self.link is not None
        await self._vectors.enter_async_context(client.msix(self.link.session, 1))

    async def command(self, disable: bool) -> None:
        """Set or clear COMMAND.INTX_DISABLE."""
        async with self._lock:
            await self._configure(COMMAND, MEMORY_SPACE | (INTX_DISABLE if disable else 0))

    async def reset(self, *, flr: bool) -> None:
        """DEVICE_RESET, or a function level reset by configuration space; memory is decoded again then."""
        async with self._lock:
            if flr:
                await self._configure(self.card.device_control, INITIATE_RESET)
            elif self.link is not None:
                with suppress(client.Disconnected):
                    await self.link.session.reset()
            await self._configure(COMMAND, MEMORY_SPACE)

    async def _configure(self, offset: int, value: int) -> None:
        if self.link is not None:
            with suppress(client.Disconnected):
                await self.link.session.region_write(RegionIndex.CONFIG, offset, value.to_bytes(2, "little"))

    def lose(self) -> None:
        """The server ends."""
        if self.link is not None:
            self.link.lose()
            self.lost = True

    async def reconnect(self) -> None:
        """Another session with the card, which has been reset; what interrupts were used are used again."""
        async with self._lock:
            if self.link is not None:
                link, self.link = self.link, None
                link.lose()
                await self._vectors.aclose()
                self._close_bars()
                await link.end()
            self.link = await self._connect()
            self.lost = False
            try:
                await self.line.reconnect(self.link.session)
                if self.msix:
                    await self._enter_msix()
                elif not self.line.enabled:  # it was lost on its way back from MSI-X
                    await self.line.enable()
            except client.Disconnected:
                pass


@dataclass(frozen=True, slots=True)
class Interrupt:
    """An interrupt in service."""

    chip: Socketed
    delivery: Delivery
    attachments: int
    """To the irqchip when it was taken."""


class Machine:
    """`drivers` of cards on one line, `chips` to route it to, and a CPU that does one thing at a time."""

    def __init__(self, chips: Sequence[Socketed], cards: Sequence[Card]) -> None:
        self.chips = chips
        self.controller = InterruptController(chips[0], [IntxRoute(IntxMode.ENABLED, 10)])
        self.drivers = [Driver(card) for card in cards]
        self.in_service: list[Interrupt] = []

    @property
    def chip(self) -> Socketed:
        """The irqchip in use."""
        chip = self.controller.chip
        assert isinstance(chip, Socketed)
        return chip

    @property
    def line(self) -> int:
        """The line of the root bus that all drivers have."""
        line = self.drivers[0].line.line
        assert line is not None
        return line

    @property
    def route(self) -> IntxRoute:
        """Where the line goes."""
        return self.controller.route(self.line)

    @property
    def routed(self) -> bool:
        """Whether a CPU hears of the line's level: it goes to an input that the irqchip in use has."""
        return self.route.mode is IntxMode.ENABLED and self.route.gsi < self.chip.inputs

    @property
    def straight(self) -> bool:
        """Whether lines are to be wired straight into the irqchip in use."""
        return self.routed and self.chip.resample and self.chip.attaches

    @property
    def levels(self) -> set[int]:
        """Inputs to be driven high: by an interrupt on the slow path or, inverted, for want of one. A device
        whose session is over drives nothing.
        """
        lines = [driver.line for driver in self.drivers]
        pending = any(line.pending and not line.session.trapping.over for line in lines)
        high = self.route.mode is not IntxMode.DISABLED and pending != (self.route.mode is IntxMode.INVERTED)
        return {self.route.gsi} if high else set()

    @property
    def counters(self) -> list[InputCounters]:
        """Of all inputs of all irqchips."""
        return [counters for chip in {socketed.chip for socketed in self.chips} for counters in chip.counters]

    # --- the CPU

    def acknowledge(self) -> None:
        """Take an interrupt, if there is one."""
        delivery = self.chip.chip.acknowledge()
        if delivery is not None:
            self.in_service.append(Interrupt(self.chip, delivery, self.chip.attachments))

    def end(self) -> None:
        """End the interrupt taken last, at the irqchip that it was taken from."""
        if self.in_service:
            interrupt = self.in_service.pop()
            interrupt.chip.chip.end(interrupt.delivery)

    @property
    def outlasts(self) -> bool:
        """Whether the interrupt taken last is older than an attachment to its irqchip, whose device is told
        of its end all the same.
        """
        last = self.in_service[-1:]
        return any(interrupt.attachments != interrupt.chip.attachments for interrupt in last)

    async def handle(self) -> None:
        """What a handler does: ask every card, then end the interrupt."""
        for driver in self.drivers:
            await driver.read_isr()
        self.end()
        await trio.testing.wait_all_tasks_blocked()

    async def work_off(self) -> int:
        """Handle interrupts until there are no more; how many there were. As many as an interrupt controller
        has inputs may wait; any more would be a storm.
        """
        while self.in_service:
            await self.handle()
        for count in range(MOST_INTERRUPTS):
            if not self.chip.chip.asks:
                return count
            self.acknowledge()
            await self.handle()
        raise AssertionError("interrupts never end")
