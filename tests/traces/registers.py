"""A card's registers, by the names that traces and recordings have for them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

import client
from client.pci import Command, PciControl, read_config
from client.session import Session
from firmware import Nic
from protocol.vfio import IrqSetFlags
from trionic.engines import NATIVE, EngineConfig, open_engine

MSIX = 2
LIVE_MIGRATION_BAR = 4
COMMON, NOTIFY, ISR, DEVICE = 1, 2, 3, 4  # cfg_type

REGISTERS = {
    "device_feature_select": 0x00,
    "device_feature": 0x04,
    "driver_feature_select": 0x08,
    "driver_feature": 0x0C,
    "config_msix_vector": 0x10,
    "num_queues": 0x12,
    "device_status": 0x14,
    "config_generation": 0x15,
    "queue_select": 0x16,
    "queue_size": 0x18,
    "queue_msix_vector": 0x1A,
    "queue_enable": 0x1C,
    "queue_notify_off": 0x1E,
    "queue_desc": 0x20,
    "queue_driver": 0x28,
    "queue_device": 0x30,
}

STRUCTURES = {"isr": ISR, "notify": NOTIFY, "device": DEVICE}

Lines = list[list[str]]


async def do_each(steps: Lines, do: Callable[[list[str]], Awaitable[None]]) -> None:
    """Do these in turn; an AssertionError says which it was."""
    for number, step in enumerate(steps):
        try:
            await do(step)
        except AssertionError as error:
            raise AssertionError(f"step {number}, {' '.join(step)}: {error}") from error


class Registers:
    """Those of the card behind `session`, and an eventfd for each of its vectors."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.places: dict[int, tuple[int, int]] = {}
        self.multiplier = 0
        self.fds: list[int] = []

    async def prepare(self) -> None:
        """Find the structures, and wire every vector that there is."""
        config = await read_config(self.session)
        for found in config.virtio:
            self.places.setdefault(found.kind, (found.bar, found.offset))
            if found.kind == NOTIFY:
                self.multiplier = found.multiplier
        pci = PciControl(self.session, config)
        await pci.set_command(Command.MEMORY | Command.MASTER)
        await pci.set_msix(enabled=True)
        count = self.session.irqs[MSIX].count
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        await self.session.set_irqs(MSIX, flags, 0, count, fds=self.fds)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def place(self, text: str) -> tuple[int, int]:
        """The BAR, and the offset in it."""
        name, _, more = text.partition("+")
        structure, _, register = name.partition(".")
        offset = int(more or "0", 0)
        if structure == "lm":
            return LIVE_MIGRATION_BAR, offset
        if structure.startswith("bar"):
            return int(structure[3:]), offset
        bar, start = self.places[STRUCTURES.get(structure, COMMON)]
        return bar, start + offset + (REGISTERS[register] if register else 0)

    async def read(self, place: str, width: int) -> int:
        bar, offset = self.place(place)
        return int.from_bytes(await self.session.region_read(bar, offset, width), "little")

    async def write(self, place: str, width: int, value: int) -> None:
        bar, offset = self.place(place)
        await self.session.region_write(bar, offset, value.to_bytes(width, "little"))


@asynccontextmanager
async def served(nic: Nic, path: Path, engine: EngineConfig = NATIVE) -> AsyncIterator[Session]:
    """A client of a card that is served at `path`, and given back at the end."""
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(open_engine(engine), [(nic.function, path)]))
            nursery.start_soon(nic.run)
            async with client.connect(path) as session:
                yield session
            nursery.cancel_scope.cancel()
    finally:
        nic.close()
