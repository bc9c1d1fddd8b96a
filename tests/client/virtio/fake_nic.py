"""A network card behind a vfio-user socket, written from virtio 1.3 and the vfio-user spec with struct alone.

The witness for the driver: nothing of the card comes from `protocol`, `client` or `device`. What is sent to
it comes back (loopback). It is slow and simple, keeps a log of what the driver did, and can be told to
misbehave.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from errno import EINVAL

import trio

import client
from client._nursery import background
from tests.client import peer as wire
from tests.client.fake_mover import PRE_COPY, RESUMING, RUNNING, STOP, FakeMover
from tests.client.peer import FakeRegion, Message, Peer
from tests.client.virtio.ring_device import Chain, RingDevice

CONFIG = 7
COMMON, ISR, DEVICE, NOTIFY = 0x0, 0x100, 0x200, 0x3000
RX, TX, CTRL = 0, 1, 2
NO_VECTOR = 0xFFFF

CSUM, MTU, MAC, MRG, STATUS, CTRL_VQ, CTRL_RX, CTRL_MAC, ANNOUNCE = 0, 3, 5, 15, 16, 17, 18, 23, 21
EVENT_IDX, VERSION_1, ACCESS_PLATFORM = 29, 32, 33
ALL = (
    CSUM,
    MTU,
    MAC,
    MRG,
    STATUS,
    CTRL_VQ,
    CTRL_RX,
    CTRL_MAC,
    ANNOUNCE,
    EVENT_IDX,
    VERSION_1,
    ACCESS_PLATFORM,
)


def config_space() -> bytearray:
    """An IFC VF's header with the four virtio structures and MSI-X."""
    raw = bytearray(4096)
    struct.pack_into("<HHHHI", raw, 0, 0x1AF4, 0x1041, 0, 0x0010, 0x0200_0001)
    struct.pack_into("<HH", raw, 0x2C, 0x8086, 0x001A)
    raw[0x34], raw[0x3D] = 0x40, 1
    at = 0x40
    for kind, offset, length in ((1, COMMON, 0x38), (3, ISR, 1), (4, DEVICE, 16)):
        struct.pack_into("<BBBBBBHII", raw, at, 9, at + 16, 16, kind, 0, 0, 0, offset, length)
        at += 16
    struct.pack_into("<BBBBBBHIII", raw, at, 9, at + 20, 20, 2, 0, 0, 0, NOTIFY, 0x1000, 4)
    struct.pack_into("<BBHII", raw, at + 20, 0x11, 0, 3, 0x2004, 0x2804)
    return raw


@dataclass
class Queue:
    """The registers of one queue."""

    size: int
    enabled: bool = False
    vector: int = NO_VECTOR
    addresses: list[int] = field(default_factory=lambda: [0, 0, 0])
    ring: RingDevice | None = None
    offered: list[Chain] = field(default_factory=list)


class FakeNic:
    """The card's registers and its loopback. `hold` keeps frames back until it is False and `pump` is
    called.
    """

    def __init__(
        self,
        *,
        features: tuple[int, ...] = ALL,
        queue_size: int = 64,
        vectors: int = 4,
        doorbell_fd: int = -1,
        doorbell_events: tuple[int, ...] = (),
    ) -> None:
        self.offered_features = sum(1 << bit for bit in features)
        self.max_size = queue_size
        self.vectors = vectors
        self.doorbell_fd = doorbell_fd
        self.doorbell_events = doorbell_events
        self.config = config_space()
        self.mac, self.link, self.mtu = bytes.fromhex("020000000001"), 1, 1500
        self.commands: list[tuple[int, int, bytes]] = []
        self.ack = 0
        self.doorbells: list[int] = []
        self.statuses: list[int] = []
        self.hold = False
        self.refuse_vectors = False
        self.generation_changes = 0
        self.windows: dict[int, tuple[int, mmap.mmap]] = {}
        self.msix: dict[int, int] = {}
        self.intx_fd, self.intx_masked, self.isr = -1, False, 0
        self.unmask_fd = -1
        self._unmask_heard = trio.CancelScope()
        self.hearing: trio.Nursery
        self.mover: FakeMover | None = None
        """Migration's commands go there, if there is one."""
        self.origin: FakeNic | None = None
        """Whose state this card takes over when a migration to it is complete."""
        self.reset()

    def reset(self) -> None:
        """What a write of 0 to the status does."""
        self.status = self.generation = 0
        self.feature_select = self.driver_select = self.queue_select = 0
        self.features = 0
        self.config_vector = NO_VECTOR
        self.queues = [Queue(self.max_size) for _ in range(3)]
        self.isr = 0

    # registers

    def read(self, region: int, offset: int, count: int) -> bytes:
        """A REGION_READ."""
        if region == CONFIG:
            return bytes(self.config[offset : offset + count])
        assert region == 0
        if ISR <= offset < DEVICE:
            value, self.isr = self.isr, 0
            return struct.pack("<B", value)
        if DEVICE <= offset < NOTIFY:
            data = self.mac + struct.pack("<HHH", self.link, 1, self.mtu) + bytes(4)
            if self.generation_changes:
                self.generation_changes -= 1
                self.generation += 1
                data = b"\xee" * 16
            return data[offset - DEVICE : offset - DEVICE + count]
        queue = self.queues[self.queue_select] if self.queue_select < 3 else Queue(0)
        words = {
            0x04: (
                4,
                self.offered_features >> 32 * self.feature_select & 0xFFFF_FFFF
                if self.feature_select < 2
                else 0,
            ),
            0x10: (2, self.config_vector),
            0x12: (2, 3),
            0x14: (1, self.status),
            0x15: (1, self.generation & 0xFF),
            0x18: (2, queue.size),
            0x1A: (2, queue.vector),
            0x1C: (2, int(queue.enabled)),
            0x1E: (2, self.queue_select),
        }
        width, value = words[offset]
        assert width == count, f"{count} bytes at {offset:#x}"
        return value.to_bytes(width, "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """A REGION_WRITE."""
        if region == CONFIG:
            self.config[offset : offset + len(data)] = data
            return
        assert region == 0
        value = int.from_bytes(data, "little")
        if offset >= NOTIFY:
            assert len(data) == 2
            assert (offset - NOTIFY) // 4 == value
            self.doorbells.append(value)
            self.pump()
            return
        queue = self.queues[self.queue_select]
        if offset in (0x20, 0x24, 0x28, 0x2C, 0x30, 0x34):
            assert len(data) == 4
            index, high = divmod(offset - 0x20, 8)
            shift = 32 if high else 0
            kept = queue.addresses[index] & ~(0xFFFF_FFFF << shift)
            queue.addresses[index] = kept | value << shift
            return
        assert len(data) == {0x00: 4, 0x08: 4, 0x0C: 4, 0x14: 1}.get(offset, 2)
        match offset:
            case 0x00:
                self.feature_select = value
            case 0x08:
                self.driver_select = value
            case 0x0C:
                shift = 32 * self.driver_select
                self.features = self.features & ~(0xFFFF_FFFF << shift) | value << shift
            case 0x10:
                self.config_vector = NO_VECTOR if self.refuse_vectors else value
            case 0x14:
                self._set_status(value)
            case 0x16:
                self.queue_select = value
            case 0x18:
                queue.size = value
            case 0x1A:
                queue.vector = NO_VECTOR if self.refuse_vectors else value
            case 0x1C:
                assert value == 1
                self._enable(queue)
            case _:
                raise AssertionError(f"write to {offset:#x}")

    def _set_status(self, value: int) -> None:
        self.statuses.append(value)
        if value == 0:
            self.reset()
            return
        assert value & self.status == self.status, "a status bit was taken back"
        if value & 8 and (self.features & ~self.offered_features or not self.features >> VERSION_1 & 1):
            value &= ~8
        self.status = value

    def _enable(self, queue: Queue, *, moved: bool = False) -> None:
        assert self.status & 8
        assert moved or not self.status & 4
        (window,) = [
            (iova, memory) for iova, (_, memory) in self.windows.items() if iova <= queue.addresses[0]
        ]
        queue.ring = RingDevice(
            memoryview(window[1]),
            window[0],
            queue.size,
            *queue.addresses,
            event_index=bool(self.features >> EVENT_IDX & 1),
        )
        queue.enabled = True

    # what the card does

    def pump(self) -> None:
        """Do everything that can be done: control commands, and frames from queue 1 to queue 0."""
        if not self.status & 4 or self.hold or self.stopped:
            return
        control, receive, transmit = (self.queues[number] for number in (CTRL, RX, TX))
        if control.ring is not None:
            for chain in control.ring.take():
                request = control.ring.read(chain)
                self.commands.append((request[0], request[1], request[2:]))
                assert [length for _, length in chain.writable] == [1]
                control.ring.write(chain, bytes([self.ack]))
                self._signal(control, control.ring.give((chain, 1)))
        assert receive.ring is not None
        assert transmit.ring is not None
        receive.offered += receive.ring.take()
        transmit.offered += transmit.ring.take()
        while transmit.offered:
            chain = transmit.offered[0]
            if not self.deliver(transmit.ring.read(chain)[12:]):
                return
            transmit.offered.pop(0)
            self._signal(transmit, transmit.ring.give((chain, 0)))

    def deliver(self, frame: bytes) -> bool:
        """Give the driver a frame; False if it has not offered enough buffers."""
        receive = self.queues[RX]
        assert receive.ring is not None
        receive.offered += receive.ring.take()
        room = [sum(length for _, length in chain.writable) for chain in receive.offered]
        needed = 0
        while sum(room[:needed]) < 12 + len(frame):
            needed += 1
            if needed > len(room):
                return False
        assert needed == 1 or self.features >> MRG & 1, "the buffer is too small for the frame"
        data = bytes(10) + struct.pack("<H", needed) + frame
        given = []
        for size in room[:needed]:
            chain = receive.offered.pop(0)
            given.append((chain, receive.ring.write(chain, data[:size])))
            data = data[size:]
        self._signal(receive, receive.ring.give(*given))
        return True

    def change_config(self, *, needs_reset: bool = False) -> None:
        """Tell the driver that the configuration changed."""
        self.generation += 1
        if needs_reset:
            self.status |= 64
        self._interrupt(self.config_vector, 2)

    def _signal(self, queue: Queue, wanted: bool) -> None:
        if wanted:
            self._interrupt(queue.vector, 1)

    def _interrupt(self, vector: int, isr: int) -> None:
        if self.intx_fd >= 0:
            self.isr |= isr
            self._level()
        elif vector in self.msix:
            self.isr |= isr & 2
            os.eventfd_write(self.msix[vector], 1)

    def _level(self) -> None:
        """INTx as the kernel's vfio-pci passes it on: it masks itself when it fires."""
        if self.isr and not self.intx_masked and self.intx_fd >= 0:
            self.intx_masked = True
            os.eventfd_write(self.intx_fd, 1)

    # messages

    def set_irqs(self, message: Message) -> None:
        """A SET_IRQS."""
        _, flags, index, start, count = struct.unpack_from("=IIIII", message.payload)
        if flags == 0x24 and index == 2:
            self.msix.update(zip(range(start, start + count), message.fds, strict=True))
        elif flags == 0x24 and index == 0:
            (self.intx_fd,) = message.fds
            self.intx_masked = False
            self._level()
        elif flags == 0x14 and index == 0:
            self._let_go_unmask()
            (self.unmask_fd,) = message.fds
            self.hearing.start_soon(self._hear_unmask, self.unmask_fd)
        elif flags == 0x21 and count == 0:
            for fd in self.msix.values():
                os.close(fd)
            self.msix.clear()
            if self.intx_fd >= 0:
                os.close(self.intx_fd)
            self.intx_fd = -1
            self._let_go_unmask()
        elif flags == 0x09 and index == 0:
            self.intx_masked = True
        elif flags == 0x11 and index == 0:
            self._unmask()
        else:
            raise AssertionError(f"SET_IRQS {flags:#x} of {index}")

    def _unmask(self) -> None:
        self.intx_masked = False
        self._level()

    async def _hear_unmask(self, fd: int) -> None:
        with trio.CancelScope() as self._unmask_heard:
            while True:
                await trio.lowlevel.wait_readable(fd)
                os.eventfd_read(fd)
                self._unmask()

    def _let_go_unmask(self) -> None:
        self._unmask_heard.cancel()
        if self.unmask_fd >= 0:
            os.close(self.unmask_fd)
            self.unmask_fd = -1

    @property
    def stopped(self) -> bool:
        """A migration holds the card still."""
        return self.mover is not None and self.mover.state not in (RUNNING, PRE_COPY)

    def _move(self, peer: Peer, message: Message, mover: FakeMover) -> None:
        before = mover.state
        mover.answer(peer, message)
        if message.command == wire.RESET:
            self.reset()
        if (before, mover.state) == (RESUMING, STOP):
            assert self.origin is not None
            self.take_over(self.origin)
        if before != mover.state == RUNNING:
            self.pump()

    def take_over(self, origin: FakeNic) -> None:
        """Go on where another card stopped; its wiring stays behind."""
        assert origin.stopped
        assert self.windows.keys() == origin.windows.keys(), "the memory is mapped first"
        self.config[:] = origin.config
        self.status, self.features, self.isr = origin.status, origin.features, origin.isr
        self.config_vector, self.queue_select = origin.config_vector, origin.queue_select
        for queue, old in zip(self.queues, origin.queues, strict=True):
            queue.size, queue.vector, queue.addresses = old.size, old.vector, list(old.addresses)
            if old.ring is not None:
                self._enable(queue, moved=True)
                assert queue.ring is not None
                queue.ring.seen, queue.ring.used = old.ring.seen, old.ring.used
                queue.offered = list(old.offered)

    async def serve(self, peer: Peer) -> None:
        """Answer until the driver leaves."""
        await peer.agree(b'{"capabilities":{"max_msg_fds":2}}\0')
        chain = struct.pack("=HHIIIQQ", 1, 1, 0, 1, 0, NOTIFY, 0x1000)
        bar = (
            FakeRegion(0x4000, 7, chain, (self.doorbell_fd,)) if self.doorbell_fd >= 0 else FakeRegion(0x4000)
        )
        await peer.describe({0: bar, CONFIG: FakeRegion(4096)}, (1, 0, self.vectors, 1, 1))
        while True:
            try:
                message = await peer.next()
            except EOFError:
                return
            self._answer(peer, message)

    def _answer(self, peer: Peer, message: Message) -> None:
        reply = message.payload[:16]
        match message.command:
            case wire.REGION_READ:
                offset, region, count = struct.unpack("=QII", message.payload)
                reply += self.read(region, offset, count)
            case wire.REGION_WRITE:
                offset, region, _ = struct.unpack_from("=QII", message.payload)
                self.write(region, offset, message.payload[16:])
            case wire.DMA_MAP:
                _, flags, offset, iova, size = struct.unpack("=IIQQQ", message.payload)
                assert flags == 3
                (fd,) = message.fds
                self.windows[iova] = (size, mmap.mmap(fd, size, offset=offset))
                os.close(fd)
                reply = b""
            case wire.DMA_UNMAP:
                _, _, iova, size = struct.unpack("=IIQQ", message.payload)
                assert self.status == 0 or self.stopped, "the window goes while the device runs"
                assert self.windows.pop(iova)[0] == size
                for queue in self.queues:
                    queue.ring = None
                reply = message.payload
            case wire.SET_IRQS:
                self.set_irqs(message)
                reply = b""
            case wire.FEATURE | wire.MIG_READ | wire.MIG_WRITE | wire.RESET if self.mover is not None:
                self._move(peer, message, self.mover)
                return
            case wire.IO_FDS if not self.doorbell_events:
                peer.refuse(message, EINVAL)
                return
            case wire.IO_FDS:
                entries = b"".join(
                    struct.pack("=QQIIIIQ", NOTIFY + 4 * queue, 2, queue, 0, 0, 0, 0)
                    for queue in range(len(self.doorbell_events))
                )
                peer.reply(
                    message,
                    struct.pack("=IIII", 16 + len(entries), 0, 0, len(self.doorbell_events)) + entries,
                    self.doorbell_events,
                )
                return
            case _:
                raise AssertionError(message)
        if not message.flags & wire.NO_REPLY:
            peer.reply(message, reply)


@asynccontextmanager
async def session_with_nic(nic: FakeNic) -> AsyncIterator[client.Session]:
    """A session whose server is the fake card."""
    ours, theirs = socket.socketpair()
    try:
        async with background() as nursery:
            nic.hearing = nursery
            nursery.start_soon(nic.serve, Peer(theirs))
            async with client.over_socket(ours) as session:
                yield session
    finally:
        theirs.close()
