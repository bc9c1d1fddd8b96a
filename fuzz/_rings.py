"""A card without a server, and a driver that lies in its rings: the queue may break, the card may not."""

from __future__ import annotations

import struct
from errno import EFAULT, EIO, ENOTCONN, ETIMEDOUT
from typing import Final

from device.dma.remote import Wanted, always
from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from device.profiles import LIVE_MIGRATION_BAR
from device.virtio.transport import Status
from firmware import Nic
from firmware.ports import open_port
from fuzz._choices import PAGE, Choices
from fuzz._driver import (
    DEVICE_AREA,
    DRIVER_AREA,
    LOG_BASE,
    LOG_CONTROL,
    LOG_END,
    LOG_STATUS,
    QUEUES,
    RING_STRIDE,
    Write,
    doorbell,
    furnish,
    life,
    live_migration,
    scribble,
)
from fuzz._zoo import MEMORY_PAGES, Zoo

CONFIG: Final = 7
STATUS: Final = 0x14
BURSTS: Final = 64
"""After so many in a row without anything new from the driver, the card works on nothing."""

SIZE: Final = MEMORY_PAGES * PAGE
LOG_SIZE: Final = MEMORY_PAGES // 8
FRAME: Final = bytes(range(60)).replace(bytes(range(6)), b"\xff" * 6)
NET_HEADER: Final = 12


class Liar:
    """The client's answers to DMA messages: mostly right, and meanwhile it does other things as well."""

    def __init__(self, zoo: Zoo, function: PciFunction) -> None:
        self._zoo = zoo
        self._function = function
        self.choices = Choices(b"")

    def read(self, iova: int, length: int, wanted: Wanted = always) -> bytes:
        """See RemoteMemory."""
        self._before(iova)
        data = self._zoo.guest[iova : iova + length]
        if len(data) < length:
            raise DeviceError(EFAULT, "nothing is there")
        return data

    def write(self, iova: int, data: bytes, wanted: Wanted = always) -> None:
        """See RemoteMemory."""
        self._before(iova)
        if iova + len(data) > SIZE:
            raise DeviceError(EFAULT, "nothing is there")
        self._zoo.guest[iova : iova + len(data)] = data

    def _before(self, iova: int) -> None:
        if not self.choices.seldom():
            return
        match self.choices.below(8):
            case 0:
                self._function.reset(ResetKind.DEVICE)
            case 1:
                with self._function.gate:
                    self._function.dma.unmap_all()
            case 2:
                with self._function.gate:
                    self._function.dma.unmap_all()
                    self._function.dma.map(0, SIZE, 3, self._zoo.kinds["memory"], 0)
            case 3:
                self._function.region_write(CONFIG, 4, bytes((self.choices.byte(), 0)))
            case 4:
                self._function.region_write(0, STATUS, bytes((self.choices.byte(),)))
            case 5:
                self._zoo.guest[iova % SIZE] ^= 1 + self.choices.below(255)
            case _:
                raise DeviceError(self.choices.pick((EIO, ETIMEDOUT, ENOTCONN, EFAULT)), "no answer")


class Rings:
    """The target: `run(data)` is a driver's life."""

    name = "rings"

    def __init__(self) -> None:
        self.exchanges = 0
        self._zoo = Zoo()
        self._nic = Nic(open_port("loopback"), mac=b"\x02\0\0\0\0\1", bar2_size=PAGE)
        self._function: PciFunction = self._nic.function
        self._liar = Liar(self._zoo, self._function)

    def close(self) -> None:
        """Take the card away."""
        self._nic.close()
        self._zoo.close()

    def seeds(self) -> list[bytes]:
        """Nothing that looks like anything: decisions are bytes."""
        return [bytes([step] * 200) for step in range(16)]

    def run(self, data: bytes) -> None:
        """One life, and an honest one after it."""
        choices = self._liar.choices = Choices(data)
        self._begin(choices)
        while choices.left:
            self._step(choices)
        self._check()
        self._liar.choices = Choices(b"")
        self._begin(self._liar.choices)
        self._honest()

    def _begin(self, choices: Choices) -> None:
        self._function.reset(ResetKind.LOST_CLIENT)
        self._zoo.refresh()
        self._zoo.guest[:] = bytes(SIZE)
        furnish(self._zoo.guest)
        self._function.dma.remote = self._liar
        self._map(choices)
        self._function.region_write(CONFIG, 4, b"\x06\0")
        for write in life(choices, int(self._nic.offered_features())):
            self._write(write)

    def _step(self, choices: Choices) -> None:
        match choices.below(16):
            case 0:
                at = choices.below(SIZE - 64)
                self._zoo.guest[at : at + 64] = choices.bytes(64).ljust(64, b"\xff")
            case 1:
                with self._function.gate:
                    self._function.dma.unmap_all()
            case 2:
                self._map(choices)
            case 3:
                self._function.region_write(CONFIG, 4, bytes((choices.byte(), 0)))
            case 4:
                for write in life(choices, int(self._nic.offered_features())):
                    self._write(write)
            case 5:
                self._write((STATUS, 1, choices.byte()))
            case 6:
                self._nic.set_link(bool(choices.byte() & 1))
            case 7 | 8 | 9:
                for bar, offset, width, value in live_migration(choices):
                    self._function.region_write(bar, offset, value.to_bytes(width, "little"))
                    self._function.region_read(bar, offset, width)
            case _:
                queue = scribble(choices, self._zoo.guest)
                self.exchanges += 1
                self._write(doorbell(queue))
        self._serve()

    def _serve(self) -> None:
        self._nic._execute_commands()  # what its thread would do, where the client must be asked
        for _ in range(BURSTS):
            if not self._nic.datapath.service():
                return
        # The driver's rings may say that there is always more, but only while the card makes something of it.
        if self._nic.datapath.service() and not self._moves():
            raise AssertionError("the card is busy with nothing")

    def _moves(self) -> bool:
        before = [queue.last_avail for queue in self._nic.card.queues]
        self._nic.datapath.service()
        return before != [queue.last_avail for queue in self._nic.card.queues]

    def _check(self) -> None:
        """A broken queue says what is wrong with it, and touches no ring any more."""
        for queue in self._nic.card.queues:
            if queue.fault is not None and not isinstance(queue.fault, str):
                raise AssertionError(f"queue {queue.index} is broken without a reason: {queue.fault!r}")
        (status,) = self._function.region_read(LIVE_MIGRATION_BAR, LOG_STATUS, 1)
        if status & ~0b111:
            raise AssertionError(f"the log's status is {status:#x}")

    def _honest(self) -> None:
        """After a reset the card carries a frame, and logs where it wrote."""
        transport = self._nic.card.transport
        if transport.status != Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK:
            raise AssertionError(f"the next driver gets no further than {transport.status!r}")
        self._nic.set_link(True)
        guest = self._zoo.guest
        room, frame, log = SIZE - 2 * PAGE, SIZE - PAGE, SIZE - 3 * PAGE
        for offset, width, value in ((LOG_BASE, 8, log), (LOG_END, 8, log + LOG_SIZE), (LOG_CONTROL, 4, 1)):
            self._function.region_write(LIVE_MIGRATION_BAR, offset, value.to_bytes(width, "little"))
        guest[frame : frame + NET_HEADER + len(FRAME)] = bytes(NET_HEADER) + FRAME
        for queue, (address, length, flags) in enumerate(
            ((room, 2048, 2), (frame, NET_HEADER + len(FRAME), 0))
        ):
            base = RING_STRIDE * queue
            struct.pack_into("<QIHH", guest, base, address, length, flags, 0)
            struct.pack_into("<HHH", guest, base + DRIVER_AREA, 0, 1, 0)
            self._write(doorbell(queue))
        self._serve()
        (used,) = struct.unpack_from("<H", guest, DEVICE_AREA + 2)
        if used != 1 or guest[room + NET_HEADER : room + NET_HEADER + len(FRAME)] != FRAME:
            raise AssertionError(f"the next driver's frame does not arrive: {used} buffers used")
        told = int.from_bytes(guest[log : log + LOG_SIZE], "little")
        written = 1 << room // PAGE | 1 << DEVICE_AREA // PAGE | 1 << (RING_STRIDE + DEVICE_AREA) // PAGE
        status = self._function.region_read(LIVE_MIGRATION_BAR, LOG_STATUS, 8)
        if written & ~told or status != b"\1".ljust(8, b"\0"):
            raise AssertionError(
                f"the next driver's log has {told:#x} for {written:#x}, and status {status!r}"
            )

    def _map(self, choices: Choices) -> None:
        """Rings and what they point to lie in memory that is mapped or must be asked for."""
        memory = self._zoo.kinds["memory"]
        rings, rest = choices.pick(((memory, memory), (None, None), (memory, None), (None, memory)))
        border = QUEUES * RING_STRIDE
        with self._function.gate:
            self._function.dma.unmap_all()
            self._function.dma.map(0, border, 3, rings, 0)
            self._function.dma.map(border, SIZE - border, 3, rest, border if rest is not None else 0)

    def _write(self, write: Write) -> None:
        offset, width, value = write
        self._function.region_write(0, offset, value.to_bytes(width, "little"))
