"""A driver that does what a trace says, by our client.

A line is one step. `w2 PLACE VALUE` writes 2 bytes (or 1, 4); `r2 PLACE = VALUE` reads them and has them be
that, `r2 PLACE -> NAME` keeps them; `poll2 PLACE = VALUE` reads until they are. A PLACE is a register of the
common configuration by its name in the specification, or the ISR byte, or an offset in BAR 4 (`lm+0x20`).
`set NAME VALUE`, `check NAME = VALUE`. `each NAME WORD...` to `end` is done for each word, put for {NAME}.

Of the network: `frames N V` pass each way, N of them, and vector V tells of them; `hold N` puts them into the
ring and rings no doorbell; `arrive`: those that were held have come out, each once; `notify Q` rings;
`logged`: the log has pages of the buffers that frames came in; `command`: the control queue answers one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from client.session import Session
from firmware import Nic
from tests.device.driver_side import DriverRing, GuestMemory
from tests.firmware.driver import BUFFER, HEADER, NO_HEADER
from tests.firmware.test_nic import Cable, frame
from tests.traces.registers import LIVE_MIGRATION_BAR, NOTIFY, Lines, Registers, do_each, served

LOG = 0x1000_0000_0000  # where DPDK maps vhost's log
LOG_SIZE = 0x2000
RING = 64
BUFFERS = 16


def read_trace(path: Path) -> Lines:
    """The steps of a trace, with its loops gone through."""
    lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    steps, rest = _unrolled([line for line in lines if line], 0)
    assert rest == len([line for line in lines if line])
    return steps


def _unrolled(lines: Lines, at: int) -> tuple[Lines, int]:
    steps: Lines = []
    while at < len(lines) and lines[at] != ["end"]:
        if lines[at][0] == "each":
            _, name, *words = lines[at]
            body, at = _unrolled(lines, at + 1)
            for word in words:
                steps += [[token.replace(f"{{{name}}}", word) for token in step] for step in body]
        else:
            steps.append(lines[at])
        at += 1
    return steps, at


class Replay(Registers):
    """A driver of the card behind `session`, whose network is `cable`."""

    def __init__(self, session: Session, cable: Cable, memory: GuestMemory, log: GuestMemory) -> None:
        super().__init__(session)
        self.cable, self.memory, self.log = cable, memory, log
        self.rings = [DriverRing(memory, RING) for _ in range(3)]
        self.rx, self.tx, self.commands = self.rings
        self.names: dict[str, int] = {"size": RING, "log": LOG, "log_size": LOG_SIZE}
        for number, ring in enumerate(self.rings):
            for name, address in zip(("desc", "avail", "used"), ring.addresses, strict=True):
                self.names[f"{name}{number}"] = address
        self.posted: dict[int, int] = {}
        self.held: deque[bytes] = deque()
        self.passed = 0
        for _ in range(BUFFERS):
            address = memory.allocate(BUFFER)
            self.posted[self.rx.add([(address, BUFFER, True)])] = address

    # --- registers

    def value(self, tokens: list[str]) -> int:
        number: int = eval(" ".join(tokens), {"__builtins__": {}}, self.names)
        return number

    def place(self, text: str) -> tuple[int, int]:
        if text.startswith("lm+"):
            return LIVE_MIGRATION_BAR, self.value([text.removeprefix("lm+")])
        return super().place(text)

    async def notify(self, queue: int) -> None:
        bar, offset = self.places[NOTIFY]
        at = offset + self.names[f"off{queue}"] * self.multiplier
        await self.session.region_write(bar, at, queue.to_bytes(2, "little"))

    # --- steps

    async def run(self, steps: Lines) -> None:
        await do_each(steps, self.step)

    async def step(self, step: list[str]) -> None:
        match step:
            case [("w1" | "w2" | "w4") as verb, place, *value]:
                await self.write(place, int(verb[1]), self.value(value))
            case [("r1" | "r2" | "r4") as verb, place, "->", name]:
                self.names[name] = await self.read(place, int(verb[1]))
            case [("r1" | "r2" | "r4") as verb, place, "=", *value]:
                got = await self.read(place, int(verb[1]))
                assert got == self.value(value), hex(got)
            case [("poll1" | "poll2") as verb, place, "=", *value]:
                while await self.read(place, int(verb[4])) != self.value(value):
                    pass
            case ["set", name, *value]:
                self.names[name] = self.value(value)
            case ["check", name, "=", *value]:
                assert self.names[name] == self.value(value), self.names[name]
            case ["notify", queue]:
                await self.notify(int(queue))
            case ["frames", number, vector]:
                for _ in range(int(number)):
                    await self.pass_one(self.fds[self.value([vector])])
            case ["hold", number]:
                for _ in range(int(number)):
                    self.held.append(self.make_available())
            case ["arrive"]:
                while self.held:
                    assert await self.out() == self.held.popleft()
            case ["command"]:
                await self.command()
            case ["logged"]:
                self.check_log()
            case _:
                raise ValueError(step)

    # --- frames

    def make_available(self) -> bytes:
        self.tx.used()
        sent = frame(self.passed.to_bytes(4, "little") + bytes(46))
        self.passed += 1
        address = self.memory.allocate(HEADER + len(sent))
        self.memory.write(address, NO_HEADER + sent)
        self.tx.add([(address, HEADER + len(sent), False)])
        return sent

    async def out(self) -> bytes:
        await trio.lowlevel.wait_readable(self.cable.network)
        return self.cable.network.recv(4000)

    async def pass_one(self, vector: int) -> None:
        """A frame out, and the same frame in, into the buffer that is next; told by that eventfd."""
        sent = self.make_available()
        await self.notify(1)
        assert await self.out() == sent
        self.cable.network.send(sent)
        while not (used := self.rx.used()):
            await trio.lowlevel.wait_readable(vector)
            os.eventfd_read(vector)
        assert len(used) == 1
        ((head, written),) = used
        address = self.posted.pop(head)
        assert self.memory.read(address + HEADER, written - HEADER) == sent
        self.posted[self.rx.add([(address, BUFFER, True)])] = address
        await self.notify(0)
        self.last = address

    async def command(self) -> None:
        """The card is told to be promiscuous, and says OK (virtio 1.3, 5.1.6.5.1)."""
        address = self.memory.allocate(4)
        self.memory.write(address, bytes([0, 0, 1, 0xEE]))
        head = self.commands.add([(address, 3, False), (address + 3, 1, True)])
        await self.notify(2)
        assert self.commands.used() == [(head, 1)]
        assert self.memory.read(address + 3, 1) == b"\0"

    def check_log(self) -> None:
        bits = self.log.read(LOG, LOG_SIZE)
        pages = {8 * at + bit for at, byte in enumerate(bits) for bit in range(8) if byte >> bit & 1}
        assert self.last // 4096 in pages
        assert self.rx.device // 4096 in pages
        last = (self.memory.iova + self.memory.size - 1) // 4096
        assert all(self.memory.iova // 4096 <= page <= last for page in pages)
        self.log.write(LOG, bytes(LOG_SIZE))


@asynccontextmanager
async def replaying(nic: Nic, cable: Cable, path: Path) -> AsyncIterator[Replay]:
    """A card that is served at `path`, and a driver of it."""
    memory, log = GuestMemory(4 << 20), GuestMemory(LOG_SIZE, LOG)
    try:
        async with served(nic, path) as session:
            for one in (memory, log):
                await session.dma_map(one.iova, one.size, fd=one.fd)
            driver = Replay(session, cable, memory, log)
            try:
                await driver.prepare()
                yield driver
            finally:
                driver.close()
    finally:
        cable.network.close()
        memory.close()
        log.close()
