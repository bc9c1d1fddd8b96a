"""A card with an interrupt pin, served in this process: what its line does is known past every client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Final

import trio

import client
from client.connecting import over_socket
from device.function import Bar, BarKind, Identity, IrqKind, MemoryBar, PciFunction, ResetKind
from device.interrupts._lines import Lines
from device.pci.capabilities import Msix, PciExpress
from server.session import Session

PAGE: Final = 4096
REGISTERS: Final = 0
"""A BAR that goes by message."""

MEMORY: Final = 2
"""A BAR that is mapped."""

ISR: Final = 0
"""In REGISTERS: tells whether the card wants something; reading it lets the line go (virtio 1.3, 4.1.4.5)."""


class WatchedFunction(PciFunction):
    """Remembers what it is told about INTx, and counts accesses to its memory by message."""

    told: list[str]
    accesses = 0

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        self.accesses += index == MEMORY
        return super().region_read(index, offset, count)

    def _note(self, index: int, what: str) -> None:
        if index == IrqKind.INTX:
            self.told.append(what)

    def irq_set_trigger(self, index: int, start: int, fds: Sequence[int | None]) -> None:
        self._note(index, "TRIGGER")
        super().irq_set_trigger(index, start, fds)

    def irq_disable(self, index: int) -> None:
        self._note(index, "DISABLE")
        super().irq_disable(index)

    def irq_trigger(self, index: int, start: int, which: Sequence[bool]) -> None:
        self._note(index, "TEST")
        super().irq_trigger(index, start, which)

    def irq_mask(self, index: int, start: int, which: Sequence[bool]) -> None:
        self._note(index, "MASK")
        super().irq_mask(index, start, which)

    def irq_unmask(self, index: int, start: int, which: Sequence[bool]) -> None:
        self._note(index, "UNMASK")
        super().irq_unmask(index, start, which)

    def irq_set_unmask_fd(self, index: int, fd: int | None) -> None:
        self._note(index, "UNMASK|EVENTFD")
        super().irq_set_unmask_fd(index, fd)


class Card:
    """Counts: `rises` of its line; how many of them a driver has `seen`, by reading the ISR; how many were
    `dropped` before, by the card itself or a reset; ISR reads that found nothing (`empty`).

    What changes these holds the function's gate, so that any thread may.
    """

    def __init__(self, name: str = "card") -> None:
        registers = Bar(REGISTERS, PAGE)
        registers.claim(0, 8, self)
        self.function = WatchedFunction(
            name,
            Identity(0x1AF4, 0x1041, 0x8086, 0x001A),
            bars=[registers, MemoryBar(MEMORY, PAGE, kind=BarKind.MEM64)],
            capabilities=[
                Msix(1, table_bar=0, table_offset=0x400, pba_offset=0x800),
                express := PciExpress(),
            ],
        )
        self.function.told = []
        self.function.on_reset = self._reset
        self.device_control: Final = express.at("DEVICE_CONTROL")
        self.high = False
        self.rises = self.seen = self.dropped = self.empty = 0
        self._vectors = 0
        self.eager = False
        """Whether it wants something again as soon as its ISR has been read."""
        self.let_go = threading.Event()
        """Set whenever the line goes low."""

    @property
    def told(self) -> list[str]:
        """Messages about INTx that have come."""
        return self.function.told

    @property
    def lines(self) -> Lines:
        """The ends of the card's interrupt wires."""
        return self.function.interrupts.lines

    @property
    def signals(self) -> int:
        """How often it signalled INTx."""
        return self.lines.signals - self._vectors

    @property
    def wired(self) -> bool:
        """Whether INTx is in use, as far as the card knows."""
        return self.function.interrupts.active is IrqKind.INTX

    def fire(self) -> None:
        """Want something of the driver, by whatever interrupts are in use."""
        with self.function.gate:
            interrupts = self.function.interrupts
            if interrupts.active is IrqKind.MSIX:
                before = self.lines.signals
                interrupts.signal(0)
                self._vectors += self.lines.signals - before
            elif not self.high:
                self._rise()

    def fall(self) -> None:
        """Want nothing any more, without having been asked."""
        with self.function.gate:
            if self.high:
                self.dropped += 1
                self._low()

    def read(self, offset: int, count: int) -> int:
        """The registers of BAR 0."""
        if offset != ISR:
            return 0
        if not self.high:
            self.empty += 1
            return 0
        self.seen += 1
        self._low()
        if self.eager:
            self._rise()
        return 1

    def write(self, offset: int, count: int, value: int) -> None:
        """Nothing can be written."""

    def _reset(self, kind: ResetKind) -> None:
        if self.high:
            self.dropped += 1
            self._low()

    def _rise(self) -> None:
        self.high = True
        self.rises += 1
        self.let_go.clear()
        self.function.interrupts.signal(0)

    def _low(self) -> None:
        self.high = False
        self.function.interrupts.intx(False)
        self.let_go.set()

    def close(self) -> None:
        self.function.close()


class Link:
    """A client's session with a card, and the server's end of it: in this thread's loop, or in a `thread` of
    its own, where `lose` does not reach it.
    """

    def __init__(self, card: Card, *, thread: bool = False) -> None:
        self._card = card
        self._thread = thread
        self._server = trio.CancelScope()
        self._leave = trio.Event()
        self._gone = trio.Event()
        self.session: client.Session

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once the session is there; until `end`."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve, theirs)
            async with over_socket(ours) as self.session:
                task_status.started()
                await self._leave.wait()
        self._gone.set()

    async def _serve(self, sock: socket.socket) -> None:
        async def serve() -> None:
            await Session(self._card.function, sock).run()

        with self._server:
            if self._thread:
                await trio.to_thread.run_sync(trio.run, serve)
            else:
                await serve()

    def lose(self) -> None:
        """The server ends; the card is reset, as for any client that is gone."""
        self._server.cancel()

    async def end(self) -> None:
        """The client leaves, and both are gone."""
        self._leave.set()
        await self._gone.wait()
