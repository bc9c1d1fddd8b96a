"""INTx of the real libvfio-user: it does not mask itself, and what it is told of masks it does not heed."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

import client
from client._eventfd import make_eventfd
from client.irqchip import InterruptController, Intx, IntxMode, IntxRoute, open_intx
from client.irqchip._requests import IntxRequests
from client.irqchip.processor import open_processor
from client.irqchip.userspace import UserspaceChip, open_ioapic, open_pic
from protocol.vfio import IrqIndex, IrqInfoFlags, RegionIndex
from tests.client.lvu_device import TRIGGER, TRIGGERED, lvu_device, session_with

INPUT = 10
CHANGES = 50


@pytest.fixture(scope="module")
def command() -> str:
    """How to start the device with a pin; building it needs Debian's archive once."""
    return lvu_device()


@dataclass
class Machine:
    session: client.Session
    intx: Intx
    chips: tuple[UserspaceChip, UserspaceChip]
    controller: InterruptController
    handled: int = 0
    """How often the handler ran."""
    handling: trio.Event = field(default_factory=trio.Event)

    async def fire(self, count: int = 1) -> None:
        """Let the device trigger its interrupt."""
        await self.session.region_write(RegionIndex.BAR0, TRIGGER, struct.pack("=I", count))

    async def handled_since(self, before: int) -> None:
        """Until the handler has run."""
        while self.handled == before:
            self.handling = trio.Event()
            await self.handling.wait()


@asynccontextmanager
async def machine(command: str, path: Path) -> AsyncIterator[Machine]:
    """A PIC, an I/O APIC and a CPU that takes the device's interrupts."""
    async with session_with(command, path) as session, open_pic() as pic, open_ioapic() as ioapic:
        controller = InterruptController(pic, [IntxRoute(IntxMode.ENABLED, INPUT)])
        async with open_intx(session, controller) as intx, open_processor(controller) as cpu:
            assert intx.line is not None
            made = Machine(session, intx, (pic, ioapic), controller)

            async def handle() -> bool:
                made.handled += 1
                made.handling.set()
                # the end of the interrupt
                await client.Bar(made.session, RegionIndex.BAR0).read(TRIGGERED, 4)
                return True

            with cpu.handling(intx.line, handle):
                await intx.enable()
                yield made


async def test_it_takes_every_message_and_heeds_none_so_it_stays_on_the_slow_path(
    command: str, tmp_path: Path
) -> None:
    async with machine(command, tmp_path / "lvu.sock") as made:
        assert made.session.irqs[IrqIndex.INTX].flags == IrqInfoFlags.EVENTFD
        assert (made.intx.accelerated, made.intx.failure) == (False, None)
        line = IntxRequests(made.session)
        await line.mask()
        resample_fd = make_eventfd()
        await line.wire_unmask(resample_fd)
        os.close(resample_fd)
        before = made.handled
        await made.fire()
        await made.handled_since(before)


async def test_every_interrupt_arrives_whatever_irqchip_there_is(command: str, tmp_path: Path) -> None:
    async with machine(command, tmp_path / "lvu.sock") as made:
        for number in range(CHANGES):
            assert made.controller.chip is made.chips[number % 2]
            before = made.handled
            await made.fire()
            await made.handled_since(before)
            before = made.handled
            await made.fire()  # and this one is somewhere on its way
            await made.controller.activate(made.chips[(number + 1) % 2])
            await made.handled_since(before)
        assert made.intx.failure is None
        triggered = struct.unpack("=I", await made.session.region_read(RegionIndex.BAR0, TRIGGERED, 4))[0]
        assert triggered == 2 * CHANGES


async def test_interrupts_that_come_faster_than_they_are_handled_are_merged_and_none_is_the_last_unheard(
    command: str, tmp_path: Path
) -> None:
    async with machine(command, tmp_path / "lvu.sock") as made:
        for _ in range(CHANGES):
            await made.fire(5)
            before = made.handled
            await made.fire()
            await made.handled_since(before)


async def test_another_session_has_the_line(command: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    async with (
        machine(command, tmp_path / "one" / "lvu.sock") as made,
        session_with(command, tmp_path / "other" / "lvu.sock") as session,
    ):
        await made.intx.reconnect(session)
        made.session = session
        before = made.handled
        await made.fire()
        await made.handled_since(before)
        await made.intx.disable()
