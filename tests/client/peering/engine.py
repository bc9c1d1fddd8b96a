"""A card that does DMA wherever it is told to, by registers: what it reaches is known past every client.

``python -m tests.client.peering.engine SOCKET REVOCATION`` serves one in a process of its own.
"""

from __future__ import annotations

import sys
import threading
from enum import IntEnum
from errno import EIO
from pathlib import Path
from typing import Final

import trio

import client
from device.dma import PROT_DMA_READ, PROT_DMA_WRITE, Pin
from device.errors import DeviceError
from device.function import Bar, BarKind, Identity, MemoryBar, PciFunction
from device.pci.capabilities import PciExpress, PowerManagement
from device.revocation import Revocation
from server import serve

PAGE: Final = 4096
REGISTERS: Final = 0
MEMORY: Final = 2
MEMORY_SIZE: Final = 16 * PAGE


class Reg(IntEnum):
    """Eight bytes each, in BAR 0, which goes by message."""

    ADDRESS = 0x00
    """Where the next DMA goes."""
    STORE = 0x08
    """Writing it writes the number there by DMA."""
    FILL = 0x10
    """The same, a page of it."""
    LOAD = 0x18
    """Reading it reads a number there by DMA; all ones if that is refused."""
    ERROR = 0x20
    """Errno of the last DMA, or 0."""
    WINDOWS = 0x28
    """How many windows there are."""
    PIN = 0x30
    """Writing it pins as many bytes there."""
    UNPIN = 0x38
    """Writing it releases all pins."""
    ACQUIRED = 0x40
    """Pages that were pinned."""
    RELEASED = 0x48
    """Pages that were released."""
    WORK = 0x50
    """Bytes there that are pinned, written to and released by a thread, all the time; 0 for none."""
    WORKED = 0x58
    """How often that was done."""


class Engine:
    """The card. Its own side is `function`."""

    def __init__(self, name: str, revocation: Revocation = Revocation.COOPERATIVE) -> None:
        registers = Bar(REGISTERS, PAGE)
        registers.claim(0, 8 * len(Reg), self)
        self.memory = MemoryBar(MEMORY, MEMORY_SIZE, kind=BarKind.MEM64, revocation=revocation)
        self.function = PciFunction(
            name,
            Identity(0x1AF4, 0x1041, 0x8086, 0x001A),
            bars=[registers, self.memory],
            capabilities=[PowerManagement(), PciExpress()],
        )
        self.address = self.error = self.worked = 0
        self._job = 0, 0
        self._working = threading.Event()
        self.pins: list[Pin] = []

    def read(self, offset: int, count: int) -> int:
        """The registers."""
        match offset:
            case Reg.ADDRESS:
                return self.address
            case Reg.LOAD:
                return int.from_bytes(self.load(self.address, count) or b"\xff" * count, "little")
            case Reg.ERROR:
                return self.error
            case Reg.WINDOWS:
                return len(self.function.dma)
            case Reg.ACQUIRED:
                return self.function.dma.pins.acquired
            case Reg.RELEASED:
                return self.function.dma.pins.released
            case Reg.WORKED:
                return self.worked
        return 0

    def write(self, offset: int, count: int, value: int) -> None:
        """See `read`."""
        data = value.to_bytes(count, "little")
        match offset:
            case Reg.ADDRESS:
                self.address = value
            case Reg.STORE:
                self.store(self.address, data)
            case Reg.FILL:
                self.store(self.address, data * (PAGE // count))
            case Reg.PIN:
                self.pin(self.address, value)
            case Reg.UNPIN:
                self.unpin()
            case Reg.WORK:
                self._job = self.address, value
                (self._working.set if value else self._working.clear)()

    def load(self, iova: int, count: int) -> bytes | None:
        """Bytes by DMA; None, and `error`, if that is refused."""
        self.error = 0
        try:
            with self.function.gate:
                return self.function.dma.read(iova, count)
        except DeviceError as refusal:
            self.error = refusal.errno or EIO
            return None

    def store(self, iova: int, data: bytes) -> bool:
        """Write by DMA; whether that was not refused."""
        self.error = 0
        try:
            with self.function.gate:
                self.function.dma.write(iova, data)
        except DeviceError as refusal:
            self.error = refusal.errno or EIO
        return not self.error

    def pin(self, iova: int, size: int) -> bool:
        """Pin memory for both ways; whether that was not refused."""
        self.error = 0
        try:
            with self.function.gate:
                self.pins.append(self.function.dma.pin(iova, size, PROT_DMA_READ | PROT_DMA_WRITE, "engine"))
        except DeviceError as refusal:
            self.error = refusal.errno or EIO
        return not self.error

    def unpin(self) -> None:
        """Release all pins."""
        with self.function.gate:
            while self.pins:
                self.pins.pop().release()

    def work(self) -> None:
        """The thread, which lets the gate go while it writes."""
        while True:
            self._working.wait()
            iova, size = self._job
            try:
                with self.function.gate:
                    pin = self.function.dma.pin(iova, size, PROT_DMA_READ | PROT_DMA_WRITE, "worker")
            except DeviceError:
                continue
            for view in pin.views:
                view[:] = b"\x77" * len(view)
            self.worked += 1
            with self.function.gate:
                pin.release()

    def close(self) -> None:
        self.unpin()
        self.function.close()


class Remote:
    """An engine behind a session, which decodes its memory."""

    def __init__(self, session: client.Session) -> None:
        self.session = session

    async def get(self, register: Reg) -> int:
        return int.from_bytes(await self.session.region_read(REGISTERS, register, 8), "little")

    async def put(self, register: Reg, value: int) -> None:
        await self.session.region_write(REGISTERS, register, value.to_bytes(8, "little"))


async def _main(path: Path, revocation: Revocation) -> None:
    engine = Engine("engine", revocation)
    threading.Thread(target=engine.work, daemon=True).start()
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, [(engine.function, path)])
        sys.stdout.write("READY=1\n")
        sys.stdout.flush()


if __name__ == "__main__":
    trio.run(_main, Path(sys.argv[1]), Revocation(sys.argv[2]))
