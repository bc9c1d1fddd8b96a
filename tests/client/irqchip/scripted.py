"""A scripted server with an INTx line beside irqchips that only take notes: one journal of both."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from enum import Enum
from typing import Final

import trio
import trio.testing

import client
from client._nursery import background
from client.irqchip import InterruptController, Intx, IntxMode, IntxRoute, Irqchip, IrqchipError, open_intx
from tests.client.peer import (
    CAPABILITIES,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    SET_IRQS,
    FakeRegion,
    Message,
    Peer,
    session_with,
)
from tests.client.test_connecting import sparse
from tests.descriptors import open_fds, settled_fds

AUTOMASKED, EDGES = 7, 1
"""What GET_IRQ_INFO says of INTx: as vfio-pci, or as libvfio-user."""

ISR: Final = 0
MAPPED: Final = 0x1000
"""Offsets in BAR 0: any access to the first lets the line go, the second is mapped."""

BAR0, CONFIG = 0, 7
INPUT: Final = 5
"""Where INTA goes."""


def _words(flags: int, count: int = 1) -> bytes:
    return struct.pack("=IIIII", 20, flags, 0, 0, count)


# argsz, flags, index, start, count as linux/vfio.h has them; and how many descriptors come along
MESSAGES: Final = {
    _words(36): ("TRIGGER", 1),
    _words(9): ("MASK", 0),
    _words(17): ("UNMASK", 0),
    _words(20): ("UNMASK|EVENTFD", 1),
    _words(33, 0): ("DISABLE", 0),
}

Journal = list[str]


class Does(Enum):
    """What becomes of a message."""

    REFUSE = "refused"
    IGNORE = "not answered"
    HANG_UP = "hung up on"


class NotingChip(Irqchip):
    """Writes down what is asked of it; what is in `refuses` it refuses."""

    def __init__(self, name: str, journal: Journal, *, resample: bool = True, inputs: int = 16) -> None:
        self.name = name
        self.inputs = inputs
        self.resample = resample
        self.refuses: set[str] = set()
        self.attached: dict[int, tuple[int, int]] = {}
        self.high: set[int] = set()
        self._journal = journal

    def _note(self, what: str, *more: object) -> None:
        self._journal.append(" ".join(map(str, (self.name, what, *more))))
        if what in self.refuses:
            raise IrqchipError(f"{self.name}: {what}", errno.EBUSY)

    def activate(self) -> None:
        self._note("activate")

    def deactivate(self) -> None:
        self._note("deactivate")

    def attach(self, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        self._note("attach", gsi)
        assert gsi not in self.attached
        self.attached[gsi] = os.dup(trigger_fd), os.dup(resample_fd)

    def detach(self, gsi: int, trigger_fd: int) -> None:
        for fd in self.attached.pop(gsi):
            os.close(fd)
        self._note("detach", gsi)

    def set_level(self, gsi: int, level: bool) -> None:
        assert (gsi in self.high) != level
        self.high ^= {gsi}
        self._note("level", gsi, int(level))

    def take(self, gsi: int = INPUT) -> int:
        """What the trigger eventfd has counted, as KVM takes it."""
        try:
            return os.eventfd_read(self.attached[gsi][0])
        except BlockingIOError:
            return 0

    def end(self, gsi: int = INPUT) -> None:
        """A CPU ends the interrupt."""
        os.eventfd_write(self.attached[gsi][1], 1)


class Server:
    """A device with a line as the kernel has it (or, with EDGES, as libvfio-user has it)."""

    def __init__(self, peer: Peer, journal: Journal, config: bytes, *, automasked: bool) -> None:
        self.peer = peer
        self.journal = journal
        self.high = False
        self.masked = False
        self.signals = 0
        self.script: dict[int, Does] = {}
        """What becomes of the SET_IRQS to come, by their number."""
        self.refuses_accesses = False
        """Those to BAR 0."""
        self.lets_access = trio.Event()
        """Accesses to BAR 0 are answered once this is set, as it is at first."""
        self.lets_access.set()
        self._config = config
        self._automasked = automasked
        self._trigger = -1
        self._awake = trio.Event()

    async def run(self) -> None:
        """Answers until the client is gone; `wake` makes it answer again after it has ignored something."""
        try:
            while True:
                await self._handle(await self.peer.next())
        except (EOFError, ConnectionResetError):
            self.peer.sock.close()
        finally:
            self._wire(-1)

    async def _handle(self, message: Message) -> None:
        if message.command == SET_IRQS:
            does = self.script.get(0)
            self.script = {number - 1: each for number, each in self.script.items() if number}
            name, fds = MESSAGES[message.payload]
            assert len(message.fds) == fds
            self.journal.append(name)
            if does is Does.HANG_UP:
                for fd in message.fds:
                    os.close(fd)
                raise EOFError
            if does is Does.IGNORE:
                await self._awake.wait()
            if does is Does.REFUSE:
                for fd in message.fds:
                    os.close(fd)
                self.peer.refuse(message, errno.EIO)
            else:
                self.peer.reply(message)
                self._set_irqs(name, message.fds)
            return
        offset, region, count = struct.unpack_from("=QII", message.payload)
        if (message.command, region) == (REGION_READ, CONFIG):
            self.peer.reply(message, message.payload + self._config[offset : offset + count])
            return
        assert region == BAR0
        assert message.command in (REGION_READ, REGION_WRITE)
        self.journal.append("read" if message.command == REGION_READ else "write")
        if self.refuses_accesses:
            self.peer.refuse(message, errno.EIO)
            return
        if offset == ISR:
            self.high = False
        await self.lets_access.wait()
        if message.flags == 0:
            self.peer.reply(
                message,
                message.payload[:16] + bytes(count if message.command == REGION_READ else 0),
                flags=REPLY,
            )

    def _set_irqs(self, name: str, fds: tuple[int, ...]) -> None:
        match name:
            case "TRIGGER":
                if self._trigger < 0:  # a line that is in use stays masked, as in the kernel
                    self.masked = False
                self._wire(*fds)
                if self.high and self._automasked and not self.masked:
                    self._signal()
            case "DISABLE":
                self._wire(-1)
            case "UNMASK|EVENTFD":
                os.close(*fds)
            case "MASK" if self._automasked:
                self.masked = True
            case "UNMASK" if self.masked:
                self.masked = False
                if self.high:
                    self._signal()

    def raise_line(self) -> None:
        """The device wants something."""
        self.high = True
        if not self.masked:
            self._signal()

    def _signal(self) -> None:
        if self._trigger >= 0:
            self.masked = self._automasked
            self.signals += 1
            os.eventfd_write(self._trigger, 1)

    def _wire(self, fd: int) -> None:
        if self._trigger >= 0:
            os.close(self._trigger)
        self._trigger = fd

    def wake(self) -> None:
        """Answer what was ignored, and everything since."""
        self._awake.set()


class Place:
    """Of tests: `xics` is active, INTA of the device in slot 0 goes to INPUT."""

    def __init__(self) -> None:
        self.journal: Journal = []
        self.xics = NotingChip("xics", self.journal)
        self.xive = NotingChip("xive", self.journal)
        self.controller = InterruptController(self.xics, [IntxRoute(IntxMode.ENABLED, INPUT)])
        self.journal.clear()

    def said(self) -> Journal:
        """The journal since the last time."""
        said = self.journal.copy()
        self.journal.clear()
        return said

    @asynccontextmanager
    async def device(
        self,
        *,
        pin: int = 1,
        lines: int = 1,
        intx_flags: int = AUTOMASKED,
        capabilities: bytes = CAPABILITIES,
    ) -> AsyncIterator[tuple[client.Session, Server]]:
        """A session with a device whose BAR 0 may be mapped in part."""
        config = bytearray(256)
        config[0x3D] = pin
        fd = os.memfd_create("bar")
        os.truncate(fd, 0x2000)
        regions = {BAR0: FakeRegion(0x2000, 7, sparse((MAPPED, 0x1000)), (fd,)), CONFIG: FakeRegion(256)}
        try:
            async with (
                session_with(
                    regions=regions,
                    irqs=(lines, 32, 4, 1, 1),
                    intx_flags=intx_flags,
                    capabilities=capabilities,
                ) as (session, peer),
                background() as nursery,
            ):
                server = Server(peer, self.journal, bytes(config), automasked=intx_flags == AUTOMASKED)
                nursery.start_soon(server.run)
                yield session, server
        finally:
            os.close(fd)

    @asynccontextmanager
    async def intx(
        self, *, bypass: bool = True, intx_flags: int = AUTOMASKED
    ) -> AsyncIterator[tuple[Intx, Server]]:
        """The line of such a device, enabled; the journal is empty."""
        async with (
            self.device(intx_flags=intx_flags) as (session, server),
            open_intx(session, self.controller, bypass=bypass) as intx,
        ):
            await intx.enable()
            self.said()
            yield intx, server


@contextmanager
def nothing_left() -> Iterator[Place]:
    """A place for a test that leaves no descriptor, no subscription, no attachment and no level behind."""
    before = settled_fds()
    place = Place()
    yield place
    assert len(place.controller.irqchip_change) == len(place.controller.routing_change) == 0
    for chip in (place.xics, place.xive):
        assert not chip.attached
        assert not chip.high
    assert open_fds() == before


async def settled() -> None:
    """Until everybody waits."""
    await trio.testing.wait_all_tasks_blocked()
