"""A driver that does again what a real one was recorded to do.

What was written is written, and what was read must read the same. Not so what depends on the moment: the ISR
byte, the generation of the configuration, which counts what commands did, and ring state, which has to be
that of the rings here and is written as it was read.

The rings lie at the real driver's addresses. With each doorbell comes work: receive buffers are put into the
ring, a frame goes out and comes back, a command is answered. Work for a queue that is stopped waits in its
ring, and is done when the driver has the queue go on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from client.session import Session
from firmware import Nic
from tests.device.driver_side import DriverRing, GuestMemory
from tests.firmware.driver import BUFFER, HEADER, NO_HEADER
from tests.firmware.test_nic import Cable, frame
from tests.traces.recordings import is_ring_state
from tests.traces.registers import Lines, Registers, do_each, served
from tests.traces.replay import BUFFERS
from trionic.engines import EngineConfig

PAGE: Final = 4096
BUFFERS_AT: Final = 0x7000_0000_0000  # far above what the recorded guests had
DRIVER_OK: Final = 4
NO_VECTOR: Final = 0xFFFF
RX, TX, CONTROL = range(3)

UNCOMPARED: Final = ("isr", "common.config_generation")


class Queue:
    """A ring as the recorded driver set it up, at its addresses and in a DMA window of its own."""

    def __init__(self, size: int, addresses: tuple[int, int, int], begin: int) -> None:
        descriptors, driver, device = self.addresses = addresses
        first = descriptors // PAGE * PAGE
        last = max(descriptors + 16 * size, driver + 6 + 2 * size, device + 6 + 8 * size)
        self.memory = GuestMemory((last - first + PAGE - 1) // PAGE * PAGE, first)
        self.ring = DriverRing(self.memory, size)
        self.ring.descriptors, self.ring.driver, self.ring.device = addresses
        self.ring.avail_index = self.ring.used_seen = begin
        for index in (driver + 2, device + 2):
            self.memory.write(index, begin.to_bytes(2, "little"))

    @property
    def used_index(self) -> int:
        """As the card has written it."""
        return int.from_bytes(self.memory.read(self.ring.device + 2, 2), "little")

    def overlaps(self, other: Queue) -> bool:
        mine, theirs = self.memory, other.memory
        return mine.iova < theirs.iova + theirs.size and theirs.iova < mine.iova + mine.size


@dataclass
class Setup:
    """What the recorded driver did with a queue last."""

    registers: dict[str, int] = field(default_factory=dict)
    state: int = 0
    """Where the ring is to begin, as it was for the recorded driver."""
    told: int | None = None
    """Where the ring had got, as the recorded driver read it."""
    enabled: bool = False

    @property
    def addresses(self) -> tuple[int, int, int]:
        low, middle, high = (
            self.registers[f"common.queue_{name}+4"] << 32 | self.registers[f"common.queue_{name}"]
            for name in ("desc", "driver", "device")
        )
        return low, middle, high

    @property
    def vector(self) -> int:
        return self.registers.get("common.queue_msix_vector", NO_VECTOR)


class Again(Registers):
    """A driver of the card behind `session`, whose network is `cable` and whose address is `mac`."""

    def __init__(self, session: Session, cable: Cable, mac: bytes) -> None:
        super().__init__(session)
        self.cable, self.mac = cable, mac
        self.buffers = GuestMemory(4 << 20, BUFFERS_AT)
        self.room = [self.buffers.allocate(BUFFER) for _ in range(BUFFERS)]
        self.command = self.buffers.allocate(4)
        self.status = self.selected = 0
        self.setups = [Setup() for _ in range(3)]
        self.queues: dict[int, Queue] = {}
        self.posted: dict[int, int] = {}
        self.leaving: deque[bytes] = deque()
        """Frames in the ring, or out of it but not seen yet."""
        self.coming: deque[bytes] = deque()
        """Frames that were sent back, but not received yet."""
        self.commands = 0
        """How many are to be answered."""
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

    def runs(self, queue: int) -> bool:
        return self.setups[queue].enabled and bool(self.status & DRIVER_OK)

    # --- steps

    async def run(self, steps: Lines) -> None:
        await do_each(steps, self.step)

    async def step(self, step: list[str]) -> None:
        verb, place, *_ = step
        value, width = int(step[-1], 0), int(verb[1])
        if verb[0] == "r" and is_ring_state(verb, place):
            await self.read_state(place, width, value)
        elif verb[0] == "r":
            await self.look(place, width, value)
        elif is_ring_state(verb, place):
            await self.write_state(place, width, value)
        else:
            await self.do(place, width, value)

    async def look(self, place: str, width: int, value: int) -> None:
        """Read what the recorded driver read."""
        got = await self.read(place, width)
        while place == "common.queue_enable" and got != value:  # it is stopping
            got = await self.read(place, width)
        assert place in UNCOMPARED or got == value, hex(got)
        if place.startswith("common.queue_"):
            self.setups[self.selected].registers[place] = value

    async def do(self, place: str, width: int, value: int) -> None:
        """Write; and do what a driver does beside it."""
        if place.startswith("notify+"):
            self.work(value)
        setup = self.setups[self.selected]
        if place == "common.queue_select":
            self.selected = value
        elif place == "common.queue_enable":
            if value and not setup.enabled:
                await self.prepare_ring(self.selected)
            setup.enabled = bool(value)
        elif place.startswith("common.queue_"):
            setup.registers[place] = value
        await self.write(place, width, value)
        if place == "common.device_status":
            self.status = value
            if not value:
                self.setups = [Setup(told=setup.told) for setup in self.setups]
        elif place.startswith("notify+"):
            self.rung[value] += 1
            if self.runs(value):
                await self.finish(value)

    # --- rings

    async def read_state(self, place: str, width: int, value: int) -> None:
        """The card says where the ring has got: not less than it had before, and not more than after."""
        number = state_of(place)
        queue = self.queues[number]
        before = queue.used_index
        got = await self.read(place, width)
        after = queue.used_index
        for index in (got >> shift & 0xFFFF for shift in range(0, 8 * width, 16)):
            assert (index - before) & 0xFFFF <= (after - before) & 0xFFFF, (before, hex(got), after)
        self.setups[number].told = self.setups[number].state = value & 0xFFFF

    async def write_state(self, place: str, width: int, value: int) -> None:
        number = state_of(place)
        self.setups[number].state = value & 0xFFFF
        if self.goes_on(number):
            value = int.from_bytes(
                self.queues[number].used_index.to_bytes(2, "little") * (width // 2), "little"
            )
        await self.write(place, width, value)

    def goes_on(self, number: int) -> bool:
        """Whether the ring that is set up is the one that was stopped, where it was stopped."""
        setup, queue = self.setups[number], self.queues.get(number)
        return queue is not None and queue.addresses == setup.addresses and setup.state == setup.told

    async def prepare_ring(self, number: int) -> None:
        if self.goes_on(number):
            return
        setup = self.setups[number]
        queue = Queue(setup.registers["common.queue_size"], setup.addresses, setup.state)
        for other in [each for each, old in self.queues.items() if each == number or old.overlaps(queue)]:
            old = self.queues.pop(other)
            await self.session.dma_unmap(old.memory.iova, old.memory.size)
            old.memory.close()
        self.queues[number] = queue
        await self.session.dma_map(queue.memory.iova, queue.memory.size, fd=queue.memory.fd)
        if number == RX:
            self.room += self.posted.values()
            self.posted.clear()
        elif number == TX:
            self.leaving.clear()
        else:
            self.commands = 0

    # --- work

    def work(self, number: int) -> None:
        """Have the doorbell of this queue mean something."""
        ring = self.queues[number].ring
        if number == RX:
            for address in self.room:
                self.post(address)
            self.room.clear()
        elif number == TX:
            ring.used()
            sent = frame(self.rung[TX].to_bytes(4, "little") + bytes(46), self.mac)
            address = self.buffers.allocate(HEADER + len(sent))
            self.buffers.write(address, NO_HEADER + sent)
            ring.add([(address, HEADER + len(sent), False)])
            self.leaving.append(sent)
        else:
            # The card is to be promiscuous (virtio 1.3, 5.1.6.5.1).
            self.buffers.write(self.command, bytes([0, 0, 1, 0xEE]))
            ring.add([(self.command, 3, False), (self.command + 3, 1, True)])
            self.commands += 1

    async def finish(self, number: int) -> None:
        """All that was rung for is done."""
        if number == TX:
            while self.leaving:
                await trio.lowlevel.wait_readable(self.cable.network)
                assert self.cable.network.recv(4000) == self.leaving[0]
                self.cable.network.send(self.leaving[0])
                self.coming.append(self.leaving.popleft())
            if self.runs(RX):
                await self.receive()
        elif number == CONTROL:
            answers = self.queues[CONTROL].ring.used()
            assert [written for _, written in answers] == [1] * self.commands
            assert self.buffers.read(self.command + 3, 1) == b"\0"
            self.commands = 0

    async def receive(self) -> None:
        """The frames that were sent back come in, in their order, and the queue's vector tells of them."""
        ring, vector = self.queues[RX].ring, self.setups[RX].vector
        while self.coming:
            ring.set_used_event(ring.used_seen)
            while not (used := ring.used()):
                if vector == NO_VECTOR:  # the driver polls its rings
                    await trio.lowlevel.checkpoint()
                else:
                    await trio.lowlevel.wait_readable(self.fds[vector])
                    os.eventfd_read(self.fds[vector])
            for address, written in [(self.posted.pop(head), written) for head, written in used]:
                received = self.buffers.read(address + HEADER, written - HEADER)
                assert received == self.coming.popleft()
                self.post(address)

    def post(self, address: int) -> None:
        self.posted[self.queues[RX].ring.add([(address, BUFFER, True)])] = address


def state_of(place: str) -> int:
    """Whose ring state this is; drivers that use pairs have no third queue in the recordings."""
    return (int(place.removeprefix("lm+"), 0) - 0x20) // 4


@asynccontextmanager
async def again(nic: Nic, cable: Cable, mac: bytes, path: Path, engine: EngineConfig) -> AsyncIterator[Again]:
    """A card that is served at `path`, and a driver of it."""
    try:
        async with served(nic, path, engine) as session:
            driver = Again(session, cable, mac)
            try:
                await driver.prepare()
                yield driver
            finally:
                driver.close()
    finally:
        cable.network.close()
