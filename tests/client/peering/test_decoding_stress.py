"""Memory decoding of a card that is switched thousands of times, while threads, drivers and other cards use
its memory as hard as they can.

The truth is read from the card by message, and from the kernel: what processes have mapped, and what they
have open.
"""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Final

import pytest
import trio

import client
from client import DeviceError, ServerError
from client.bar_memory import BarMemory, bar_memory
from client.container import open_container
from client.mapping import BarMapping
from client.virtio import NetDriver, open_net
from client.virtio.net import MEMORY_GONE
from device.revocation import Revocation
from protocol.vfio import RegionIndex
from tests.client.peering.engine import MEMORY, MEMORY_SIZE, Reg, Remote
from tests.client.peering.processes import (
    PATIENCE_S,
    Served,
    areas,
    leaving_nothing,
    serving_card,
    serving_engine,
    until,
)
from tests.client.peering.switching import Switch, Way
from tests.client.peering.toucher import ONES, PAGE, Toucher, check_reached, label, reached

THOROUGH: Final = os.environ.get("CI", "").lower() == "true"
CHANGES: Final = 500 if THOROUGH else 80
FAULTS: Final = 5_000 if THOROUGH else 500
WORKED: Final = 1_000 if THOROUGH else 100
CUTS: Final = 10_000 if THOROUGH else 1_000

QUEUES: Final = 2 << 20
"""Bytes for the other card's driver; the rest of the pages are the thread's and the test's."""

RACED: Final = QUEUES
RACED_PAGES: Final = 8
KEPT: Final = RACED + RACED_PAGES * PAGE
KEPT_SIZE: Final = 2 * PAGE
SLACK: Final = 24
"""Areas of memory that come and go with the interpreter's own; a leak would be one for each change."""

REVOCATIONS = pytest.mark.parametrize("revocation", Revocation, ids=lambda way: way.value)


class Traffic:
    """Frames that a card sends back to the driver whose queues lie in a memory that comes and goes."""

    def __init__(self, nic: NetDriver, memory: BarMemory) -> None:
        self.nic = nic
        self.memory = memory
        self.received = 0
        self.losses = 0
        """How often the driver was told that its memory is gone."""

    async def run(self) -> None:
        for start in count(1, 1 << 32):
            try:
                await self._exchange(start)
            except DeviceError as error:
                assert str(error) == MEMORY_GONE
                self.losses += 1
            await self._resume()

    async def _resume(self) -> None:
        while True:
            await self.memory.entry.wait_back()
            try:
                return await self.nic.reset()
            except DeviceError as error:
                assert str(error) == MEMORY_GONE

    async def _exchange(self, start: int) -> None:
        for number in count(start):
            frame = b"\xff" * 6 + struct.pack(">QQ", number, ~number & ONES) * 12
            await self.nic.send(frame)
            while (came := await self.nic.receive()) != frame:
                of, check = struct.unpack_from(">QQ", came, 6)
                assert of ^ check == ONES, "a frame that nobody sent"
                assert of < number
            self.received += 1

    async def moves(self) -> None:
        """A frame goes round that was not yet sent."""
        before = self.received
        await until(lambda: self.received >= before + 2)


class Stress:
    """One card's memory goes and comes back; the other card and a thread work in it."""

    def __init__(
        self,
        a: Served,
        switch: Switch,
        mapping: BarMapping,
        raced: BarMapping,
        memory: BarMemory,
        traffic: Traffic,
    ) -> None:
        self.a = a
        self.switch = switch
        self.session = switch.session
        self.mapping = mapping
        self.memory = memory
        self.traffic = traffic
        self.raced = raced
        self.toucher = Toucher(raced, RACED, RACED_PAGES)
        self.inode = os.fstat(mapping.fd).st_ino
        self.enforced = False
        self.kept = mapping.view(KEPT, KEPT_SIZE)

    async def change(self, number: int, way: Way, then: Way, *, busy: bool) -> None:
        """Off, whatever goes on, in two ways perhaps, and on again."""
        if busy:
            await self.traffic.moves()
        pattern = struct.pack("<Q", label(number, answered=True)) * (KEPT_SIZE // 8)
        self.mapping.fault(KEPT, KEPT_SIZE)
        self.kept[:] = pattern
        assert await self._bytes(KEPT, KEPT_SIZE) == pattern
        await self.switch.off(way)
        await self._away(number, pattern if way.keeps else bytes(KEPT_SIZE))
        if then is not way and not then.keeps:
            await self.switch.off(then)
            way = then
        behind = pattern if way.keeps else bytes(KEPT_SIZE)
        with self.toucher.paused():
            self.toucher.set_label(number + 1, answered=True)
            await self.switch.on(way)
            there = await self._bytes(KEPT, KEPT_SIZE)
            assert there == behind
            raced = await self._bytes(RACED, RACED_PAGES * PAGE)
            check_reached(raced, number)
            assert not any(raced) or way.keeps, "a reset leaves zeros"
            self.mapping.fault(KEPT, KEPT_SIZE)
            assert self.kept == there
            if number % 2:  # else the thread faults it in, at whatever moment
                assert self.raced.view(RACED, RACED_PAGES * PAGE) == raced

    async def _away(self, number: int, behind: bytes) -> None:
        """Nobody reaches it, and what is written in spite of that stays here."""
        assert not self.a.maps(self.inode), "a card has a window to what is not decoded"
        assert not self.memory.present
        assert set(reached(self.kept)) == {ONES}
        with self.toucher.paused():
            self.toucher.set_label(number, answered=False)
        self.kept[:] = struct.pack("<Q", label(number, answered=False)) * (KEPT_SIZE // 8)
        for _ in range(number % 5):
            await trio.lowlevel.checkpoint()
        if not self.enforced:
            assert await self._bytes(KEPT, KEPT_SIZE) == behind
            return
        with pytest.raises(ServerError):
            await self._bytes(KEPT, KEPT_SIZE)

    async def _bytes(self, offset: int, size: int) -> bytes:
        return await self.session.region_read(RegionIndex.BAR2, offset, size)


@asynccontextmanager
async def stressed(a: Served, b: Served, revocation: Revocation) -> AsyncIterator[Stress]:
    async with AsyncExitStack() as stack:
        working = await stack.enter_async_context(client.connect(a.path))
        lending = await stack.enter_async_context(client.connect(b.path))
        container = await stack.enter_async_context(open_container())
        await container.attach(working)
        switch = await Switch.of(lending)
        mapping = stack.enter_context(BarMapping(lending.regions[RegionIndex.BAR2], lending.decoding))
        raced = stack.enter_context(
            BarMapping(
                lending.regions[RegionIndex.BAR2],
                lending.decoding,
                offset=RACED,
                length=RACED_PAGES * PAGE,
            )
        )
        memory = await stack.enter_async_context(bar_memory(container, mapping, size=QUEUES))
        nic = await stack.enter_async_context(open_net(working, memory=memory))
        nursery = await stack.enter_async_context(trio.open_nursery())
        traffic = Traffic(nic, memory)
        nursery.start_soon(traffic.run)
        stress = Stress(a, switch, mapping, raced, memory, traffic)
        stress.enforced = revocation is Revocation.ENFORCED
        with stress.kept, stress.toucher.touching():
            yield stress
        nursery.cancel_scope.cancel()


@pytest.mark.timeout(900)
@REVOCATIONS
async def test_memory_that_is_switched_all_the_time_is_nobodys_while_it_is_off(
    revocation: Revocation, tmp_path: Path
) -> None:
    chance = random.Random(5)
    with serving_card(tmp_path / "a.sock") as a, serving_card(tmp_path / "b.sock", revocation) as b:
        async with leaving_nothing(a, b):
            async with stressed(a, b, revocation) as stress:
                began, settled = time.perf_counter(), 0
                for number in range(1, CHANGES + 1):
                    way, then = chance.choice([*Way]), chance.choice([*Way])
                    await stress.change(number, way, then, busy=bool(number % 3))
                    if number == CHANGES // 4:
                        settled = areas()
                await stress.traffic.moves()
                seconds = time.perf_counter() - began
                assert areas() <= settled + SLACK, "every change leaves an area of memory"
                assert stress.a.maps(stress.inode)
            inode = stress.inode
            await until(lambda: not a.maps(inode))
        traffic, toucher = stress.traffic, stress.toucher
        assert traffic.losses >= CHANGES / 3
        assert toucher.touched >= CHANGES / 2, "it was touched all along"
        assert toucher.ones, "and while nobody answered"
        print(  # noqa: T201
            f"{revocation.value}: {CHANGES} changes in {seconds:.1f} s, {traffic.received} frames,"
            f" {traffic.losses} losses of memory, touched {toucher.touched} times"
        )


@pytest.mark.timeout(900)
@REVOCATIONS
async def test_a_thread_that_faults_memory_in_while_it_goes_does_not_keep_it(
    revocation: Revocation, tmp_path: Path
) -> None:
    with serving_engine(tmp_path / "b.sock", revocation) as b:
        async with leaving_nothing(b), client.connect(b.path) as session:
            switch = await Switch.of(session)
            with BarMapping(session.regions[MEMORY], session.decoding) as mapping:
                toucher = Toucher(mapping, 0, 1)
                with toucher.touching():
                    for number in range(1, FAULTS):
                        await switch.off(Way.COMMAND)
                        with toucher.paused():
                            toucher.set_label(number, answered=False)
                        await trio.to_thread.run_sync(toucher.wait_touched)
                        with toucher.paused():
                            toucher.set_label(number + 1, answered=True)
                            await switch.on()
                            check_reached(await session.region_read(MEMORY, 0, MEMORY_SIZE), number)
                        for _ in range(number % 5):
                            await trio.lowlevel.checkpoint()


@pytest.mark.timeout(900)
@REVOCATIONS
async def test_pins_of_a_card_at_work_are_gone_before_the_memory_is(
    revocation: Revocation, tmp_path: Path
) -> None:
    chance = random.Random(11)
    with serving_engine(tmp_path / "a.sock") as a, serving_engine(tmp_path / "b.sock", revocation) as b:
        async with (
            leaving_nothing(a, b),
            client.connect(a.path) as working,
            client.connect(b.path) as lending,
        ):
            await Switch.of(working)
            switch, engine = await Switch.of(lending), Remote(working)
            async with open_container() as container:
                await container.attach(working)
                with BarMapping(lending.regions[MEMORY], lending.decoding) as mapping:
                    async with bar_memory(container, mapping) as memory:
                        await engine.put(Reg.ADDRESS, memory.iova)
                        await engine.put(Reg.WORK, 2 * PAGE)
                        for _ in range(WORKED):
                            await works(engine)
                            await switch_under_work(switch, chance.choice([*Way]), revocation)
                        await works(engine)
                assert await engine.get(Reg.WINDOWS) == 0
            await engine.put(Reg.WORK, 0)
            while await engine.get(Reg.ACQUIRED) != await engine.get(Reg.RELEASED):
                await trio.lowlevel.checkpoint()


async def works(engine: Remote) -> None:
    """It pins and writes, from now on as well."""
    before = await engine.get(Reg.WORKED)
    with trio.fail_after(PATIENCE_S):
        while await engine.get(Reg.WORKED) < before + 2:
            await trio.lowlevel.checkpoint()


async def switch_under_work(switch: Switch, way: Way, revocation: Revocation) -> None:
    """Off and on; what was there last stays there, for nobody writes any more."""
    await switch.off(way)
    if revocation is Revocation.COOPERATIVE:
        there = await switch.session.region_read(MEMORY, 0, MEMORY_SIZE)
        assert way.keeps or not any(there)
        assert await switch.session.region_read(MEMORY, 0, MEMORY_SIZE) == there
    await switch.on(way)


# what a server does on its own account

_CUTTING: Final = """
import os, random, sys
fd, size, cuts = map(int, sys.argv[1:])
chance = random.Random(7)
for _ in range(cuts):
    os.ftruncate(fd, 4096 * chance.randrange(size // 4096 + 1))
    if chance.random() < 0.5:
        os.ftruncate(fd, size)
"""


async def cut_at_random(fd: int, size: int, cuts: int) -> None:
    """A process that has nothing to do with us makes the file shorter and longer."""
    words = [sys.executable, "-c", _CUTTING, str(fd), str(size), str(cuts)]
    await trio.run_process(words, pass_fds=[fd], stdin=subprocess.DEVNULL)


@pytest.mark.timeout(900)
async def test_files_that_are_cut_at_random_end_nobody(tmp_path: Path) -> None:
    with (
        serving_engine(tmp_path / "a.sock") as a,
        serving_engine(tmp_path / "b.sock", Revocation.ENFORCED) as b,
    ):
        async with (
            leaving_nothing(a, b),
            client.connect(a.path) as working,
            client.connect(b.path) as lending,
            open_container() as container,
        ):
            await container.attach(working)
            await Switch.of(working)
            switch = await Switch.of(lending)
            engine = Remote(working)
            with BarMapping(lending.regions[MEMORY], lending.decoding) as mapping:
                toucher = Toucher(mapping, 0, RACED_PAGES)
                half = RACED_PAGES * PAGE
                async with bar_memory(container, mapping, offset=half, size=half) as memory:
                    with toucher.touching():
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(dma_until_cancelled, engine, memory.iova, half)
                            await cut_at_random(mapping.fd, MEMORY_SIZE, CUTS)
                            nursery.cancel_scope.cancel()
                    assert toucher.ones, "it was cut while it was touched"
                    await switch.off(Way.RESET)
                    await switch.on()
                    await memory.entry.wait_back()
                    await engine.put(Reg.ADDRESS, memory.iova)
                    await engine.put(Reg.STORE, 77)
                    assert await engine.get(Reg.ERROR) == 0
                    mapping.write(0, 8, 88)
                    data = await lending.region_read(MEMORY, 0, MEMORY_SIZE)
                    assert data[:8] == (88).to_bytes(8, "little")
                    assert data[half : half + 8] == (77).to_bytes(8, "little")
                    assert mapping.view(0, MEMORY_SIZE) == data


async def dma_until_cancelled(engine: Remote, iova: int, size: int) -> None:
    """Stores of another card, which say nothing about whether there is memory."""
    for number in count():
        await engine.put(Reg.ADDRESS, iova + number % (size // PAGE) * PAGE)
        await engine.put(Reg.FILL, number)
        await engine.get(Reg.ERROR)
