"""A driver of the whole card, in this process: registers, queues and interrupts as a kernel uses them."""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from device.profiles import COMMON, DEVICE_CONFIG, DOORBELLS, ISR
from device.virtio.features import Feature
from device.virtio.net import CONTROL_QUEUE, RX_QUEUE, TX_QUEUE
from device.virtio.transport import NOTIFY_STRIDE, Status
from firmware import Nic
from tests.device.driver_side import DriverRing, GuestMemory

MSIX = 2  # linux/vfio.h: VFIO_PCI_MSIX_IRQ_INDEX
VECTORS = 4  # one for each queue, by its number, and one for configuration changes
CONFIG_VECTOR = 3
CONFIG_REGION = 7
MEMORY_AND_BUS_MASTER = 6  # COMMAND register

HEADER = 12
NO_HEADER = bytes(HEADER)
BUFFER = 2048  # bytes of a receive buffer
ALL = ~Feature(0)


class Driver:
    """The registers of `nic`, and once `start`ed its queues."""

    def __init__(self, nic: Nic, *, ring_size: int = 64) -> None:
        self.nic = nic
        self.function = nic.function
        self.memory = GuestMemory(32 << 20)
        with self.function.gate:
            self.memory.map_into(self.function.dma)
        self.rings = [DriverRing(self.memory, ring_size) for _ in range(3)]
        self.rx, self.tx, self.commands = self.rings
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(VECTORS)]
        self.function.irq_set_trigger(MSIX, 0, self.fds)
        self.function.region_write(CONFIG_REGION, 4, struct.pack("<H", MEMORY_AND_BUS_MASTER))
        self.features = Feature(0)
        self._posted: dict[int, int] = {}
        self._unread: deque[bytes] = deque()

    def close(self) -> None:
        self.memory.close()
        for fd in self.fds:
            os.close(fd)

    # --- registers

    def read(self, offset: int, count: int) -> int:
        return int.from_bytes(self.function.region_read(0, offset, count), "little")

    def write(self, offset: int, count: int, value: int) -> None:
        self.function.region_write(0, offset, value.to_bytes(count, "little"))

    @property
    def status(self) -> Status:
        return Status(self.read(COMMON + 0x14, 1))

    @status.setter
    def status(self, value: int) -> None:
        self.write(COMMON + 0x14, 1, value)

    @property
    def offered(self) -> Feature:
        words = []
        for select in range(2):
            self.write(COMMON, 4, select)
            words.append(self.read(COMMON + 4, 4))
        return Feature(words[0] | words[1] << 32)

    @property
    def mac(self) -> bytes:
        return self.function.region_read(0, DEVICE_CONFIG, 6)

    @property
    def link_up(self) -> bool:
        return bool(self.read(DEVICE_CONFIG + 6, 2) & 1)

    @property
    def mtu(self) -> int:
        return self.read(DEVICE_CONFIG + 10, 2)

    @property
    def isr(self) -> int:
        return self.read(ISR, 1)

    # --- life

    def negotiate(self, wanted: Feature = ALL, *, insist: bool = False) -> bool:
        """Everything up to FEATURES_OK; whether the card agreed. `insist` on what is not offered, too."""
        self.status = 0
        self.status = Status.ACKNOWLEDGE | Status.DRIVER
        self.features = wanted if insist else self.offered & wanted
        for select in range(2):
            self.write(COMMON + 8, 4, select)
            self.write(COMMON + 12, 4, self.features >> 32 * select & 0xFFFFFFFF)
        self.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
        return bool(self.status & Status.FEATURES_OK)

    def start(self, wanted: Feature = ALL, *, buffers: int = 16) -> None:
        assert self.negotiate(wanted)
        self.write(COMMON + 0x10, 2, CONFIG_VECTOR)
        for number, ring in enumerate(self.rings):
            self.write(COMMON + 0x16, 2, number)
            self.write(COMMON + 0x18, 2, ring.size)
            self.write(COMMON + 0x1A, 2, number)
            for offset, address in zip((0x20, 0x28, 0x30), ring.addresses, strict=True):
                self.write(COMMON + offset, 8, address)
            self.write(COMMON + 0x1C, 2, 1)
        self.status = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        self.offer(buffers)

    # --- queues

    def ring_doorbell(self, queue: int) -> None:
        self.write(DOORBELLS + NOTIFY_STRIDE * queue, 2, queue)

    def offer(self, buffers: int, size: int = BUFFER) -> None:
        for _ in range(buffers):
            address = self.memory.allocate(size)
            self._posted[self.rx.add([(address, size, True)])] = address
        self.ring_doorbell(RX_QUEUE)

    def send(self, frame: bytes, header: bytes = NO_HEADER) -> None:
        if len(self.tx.free) < self.tx.size // 2:
            self.tx.used()
        address = self.memory.allocate(HEADER + len(frame))
        self.memory.write(address, header + frame)
        self.tx.add([(address, HEADER + len(frame), False)])
        self.ring_doorbell(TX_QUEUE)

    def received(self) -> list[bytes]:
        """The frames that have come since the last call, each in one buffer, which is offered again."""
        filled = [(self._posted.pop(head), written) for head, written in self.rx.used()]
        frames = [self.memory.read(address + HEADER, written - HEADER) for address, written in filled]
        for address, _ in filled:
            self._posted[self.rx.add([(address, BUFFER, True)])] = address
        if frames:
            self.ring_doorbell(RX_QUEUE)
        return frames

    async def receive(self) -> bytes:
        """The next frame, from a card that runs; those that come with it are given next."""
        while not self._unread:
            self.rx.set_used_event(self.rx.used_seen)  # an interrupt for the next one, please
            self._unread.extend(self.received())
            if not self._unread:
                await self.interrupted(RX_QUEUE)
        return self._unread.popleft()

    def command(self, *parts: bytes, room: int = 1) -> int | None:
        """Execute a control command, its bytes in `parts`; the answer, or None if it was not given."""
        buffers = []
        for part in parts:
            address = self.memory.allocate(len(part), 1)
            self.memory.write(address, part)
            buffers.append((address, len(part), False))
        answer = self.memory.allocate(max(room, 1))
        self.memory.write(answer, b"\xee")
        if room:
            buffers.append((answer, room, True))
        self.commands.add(buffers)
        self.ring_doorbell(CONTROL_QUEUE)
        if not self.commands.used():
            return None
        return self.memory.read(answer, 1)[0]

    def settle(self) -> None:
        """Let the card do all it can do now; for one that does not run."""
        while self.nic.datapath.service():
            pass

    # --- interrupts

    def fired(self, vector: int) -> bool:
        """Whether a vector was signalled since this was last asked."""
        try:
            return os.eventfd_read(self.fds[vector]) > 0
        except BlockingIOError:
            return False

    async def interrupted(self, vector: int) -> None:
        await trio.lowlevel.wait_readable(self.fds[vector])
        os.eventfd_read(self.fds[vector])


@contextmanager
def driver_of(nic: Nic) -> Iterator[Driver]:
    """A driver for `nic`, and the end of both."""
    driver = Driver(nic)
    try:
        yield driver
    finally:
        nic.close()
        driver.close()
