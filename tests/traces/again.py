"""A driver that does again what a real one was recorded to do.

What was written is written, and what was read must read the same, but for the ISR byte, which depends on the
moment. The rings lie at the real driver's addresses. With each doorbell comes work: receive buffers are put
into the ring, a frame goes out and comes back, a command is answered.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from client.session import Session
from firmware import Nic
from tests.device.driver_side import DriverRing, GuestMemory
from tests.firmware.driver import BUFFER, HEADER, NO_HEADER
from tests.firmware.test_nic import Cable, frame
from tests.traces.registers import Lines, Registers, served
from tests.traces.replay import BUFFERS

PAGE: Final = 4096
BUFFERS_AT: Final = 0x7000_0000_0000  # far above what the recorded guests had
RX, TX, CONTROL = range(3)


class Queue:
    """One queue as the recorded driver set it up: a ring at its addresses, in a DMA window of its own."""

    def __init__(self, size: int, addresses: tuple[int, int, int]) -> None:
        descriptors, driver, device = addresses
        first = descriptors // PAGE * PAGE
        last = max(descriptors + 16 * size, driver + 6 + 2 * size, device + 6 + 8 * size)
        self.memory = GuestMemory((last - first + PAGE - 1) // PAGE * PAGE, first)
        self.ring = DriverRing(self.memory, size)
        self.ring.descriptors, self.ring.driver, self.ring.device = addresses


class Again(Registers):
    """A driver of the card behind `session`, whose network is `cable` and whose address is `mac`."""

    def __init__(self, session: Session, cable: Cable, mac: bytes) -> None:
        super().__init__(session)
        self.cable, self.mac = cable, mac
        self.buffers = GuestMemory(4 << 20, BUFFERS_AT)
        self.selected = 0
        self.registers: dict[tuple[int, str], int] = {}
        self.queues: dict[int, Queue] = {}
        self.room = [self.buffers.allocate(BUFFER) for _ in range(BUFFERS)]
        self.posted: dict[int, int] = {}
        self.tx_buffer, self.command = self.buffers.allocate(BUFFER), self.buffers.allocate(4)
        self.sent = b""
        self.rung = [0, 0, 0]
        """How often there was work, by queue."""

    async def prepare(self) -> None:
        """As `Registers.prepare`; and the card reaches the memory for frames."""
        await super().prepare()
        await self.session.dma_map(self.buffers.iova, self.buffers.size, fd=self.buffers.fd)

    def close(self) -> None:
        super().close()
        for memory in (self.buffers, *(queue.memory for queue in self.queues.values())):
            memory.close()

    # --- steps

    async def run(self, steps: Lines) -> None:
        for number, step in enumerate(steps):
            try:
                await self.step(step)
            except AssertionError as error:
                raise AssertionError(f"step {number}, {' '.join(step)}: {error}") from error

    async def step(self, step: list[str]) -> None:
        match step:
            case [verb, place, value]:
                await self.do(place, int(verb.removeprefix("w")), int(value, 0))
            case [verb, place, "=", value]:
                got = await self.read(place, int(verb.removeprefix("r")))
                assert place == "isr" or got == int(value, 0), hex(got)
            case _:
                raise ValueError(step)

    async def do(self, place: str, width: int, value: int) -> None:
        """Write; and what a driver does beside it."""
        if place == "common.queue_select":
            self.selected = value
        self.registers[self.selected, place] = value
        if place.startswith("notify+"):
            await self.work(value)
        if (place, value) == ("common.queue_enable", 1):
            await self.enable(self.selected)
        await self.write(place, width, value)
        if (place, value) == ("common.device_status", 0):
            await self.forget()
        if place.startswith("notify+"):
            await self.worked(value)

    async def enable(self, number: int) -> None:
        def address(name: str) -> int:
            low, high = (self.registers[number, f"common.{name}{half}"] for half in ("", "+4"))
            return high << 32 | low

        queue = Queue(
            self.registers[number, "common.queue_size"],
            (address("queue_desc"), address("queue_driver"), address("queue_device")),
        )
        self.queues[number] = queue
        await self.session.dma_map(queue.memory.iova, queue.memory.size, fd=queue.memory.fd)

    async def forget(self) -> None:
        """The card was reset: the memory is the kernel's again."""
        for queue in self.queues.values():
            await self.session.dma_unmap(queue.memory.iova, queue.memory.size)
            queue.memory.close()
        self.queues.clear()
        self.room += self.posted.values()
        self.posted.clear()

    # --- work

    async def work(self, number: int) -> None:
        """Have the doorbell of this queue mean something."""
        ring = self.queues[number].ring
        ring.used()
        ring.set_used_event(ring.used_seen)
        if number == RX:
            for address in self.room:
                self.post(address)
            self.room.clear()
        elif number == TX:
            self.sent = frame(self.rung[TX].to_bytes(4, "little") + bytes(46), self.mac)
            self.buffers.write(self.tx_buffer, NO_HEADER + self.sent)
            ring.add([(self.tx_buffer, HEADER + len(self.sent), False)])
        else:
            # The card is to be promiscuous (virtio 1.3, 5.1.6.5.1).
            self.buffers.write(self.command, bytes([0, 0, 1, 0xEE]))
            ring.add([(self.command, 3, False), (self.command + 3, 1, True)])

    async def worked(self, number: int) -> None:
        """What was rung for has been done."""
        self.rung[number] += 1
        if number == TX:
            await trio.lowlevel.wait_readable(self.cable.network)
            assert self.cable.network.recv(4000) == self.sent
            await self.receive()
        elif number == CONTROL:
            ((_, written),) = self.queues[CONTROL].ring.used()
            assert (written, self.buffers.read(self.command + 3, 1)) == (1, b"\0")

    async def receive(self) -> None:
        """The frame that was sent last comes back, and the queue's vector tells of it."""
        ring = self.queues[RX].ring
        vector = self.fds[self.registers[RX, "common.queue_msix_vector"]]
        self.cable.network.send(self.sent)
        while not (used := ring.used()):
            await trio.lowlevel.wait_readable(vector)
            os.eventfd_read(vector)
        ((head, written),) = used
        address = self.posted.pop(head)
        assert self.buffers.read(address + HEADER, written - HEADER) == self.sent
        ring.set_used_event(ring.used_seen)
        self.post(address)

    def post(self, address: int) -> None:
        self.posted[self.queues[RX].ring.add([(address, BUFFER, True)])] = address


@asynccontextmanager
async def again(nic: Nic, cable: Cable, mac: bytes, path: Path) -> AsyncIterator[Again]:
    """A card that is served at `path`, and a driver of it."""
    try:
        async with served(nic, path) as session:
            driver = Again(session, cable, mac)
            try:
                await driver.prepare()
                yield driver
            finally:
                driver.close()
    finally:
        cable.network.close()
