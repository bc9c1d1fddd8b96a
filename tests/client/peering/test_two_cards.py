"""Cards that live in each other's memory, each served by a process of its own, and what becomes of one when
the other is reset, killed or taken away.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import trio

import client
from client import ClientError, DeviceError
from client.bar_memory import BarMemory
from client.container import BarRange, Container, ContainerError, Entry, PageMemory, open_container
from client.dma import Arena, DmaBuffer
from client.dmabuf import exported_bar
from client.mapping import BarMapping
from client.virtio import NetDriver, open_net
from client.virtio.net import MEMORY_GONE
from device.revocation import Revocation
from protocol.vfio import RegionIndex
from tests.client.peering.processes import (
    PATIENCE_S,
    Served,
    leaving_nothing,
    nothing_left_open,
    serving_card,
    until,
)
from tests.client.peering.switching import Switch, Way

SIZE = 2 << 20
NUMBERS = count(1)

LENDING = pytest.mark.parametrize("exported", [False, True], ids=["by mapping", "by export"])
REVOCATIONS = pytest.mark.parametrize("revocation", Revocation, ids=lambda way: way.value)
WAYS = pytest.mark.parametrize("way", Way, ids=lambda way: way.value)


@dataclass(frozen=True, slots=True)
class Lender:
    """A card that lends its memory, which is mapped for all devices of a container."""

    session: client.Session
    switch: Switch
    mapping: BarMapping
    memory: BarMemory

    @property
    def inode(self) -> int:
        return os.fstat(self.mapping.fd).st_ino

    async def back(self) -> None:
        """Until cards reach it again, and we do."""
        await self.memory.entry.wait_back()
        self.mapping.fault(0, SIZE)


@asynccontextmanager
async def lending(container: Container, session: client.Session, *, exported: bool) -> AsyncIterator[Lender]:
    async with AsyncExitStack() as stack:
        switch = await Switch.of(session)
        mapping = stack.enter_context(BarMapping(session.regions[RegionIndex.BAR2], session.decoding))
        entry = await stack.enter_async_context(mapped(container, session, mapping, exported=exported))
        memory = BarMemory(mapping.view(0, SIZE), entry, mapping)
        stack.callback(memory.close)
        yield Lender(session, switch, mapping, memory)


@asynccontextmanager
async def mapped(
    container: Container, session: client.Session, mapping: BarMapping, *, exported: bool
) -> AsyncIterator[Entry]:
    if not exported:
        async with container.mapped(None, BarRange(mapping, 0, SIZE)) as entry:
            yield entry
        return
    async with (
        exported_bar(session, RegionIndex.BAR2, ((0, SIZE),)) as export,
        container.mapped(None, export) as entry,
    ):
        yield entry


async def echo(nic: NetDriver) -> bytes:
    """A frame goes round; what was sent before may come first, and no garbage."""
    frame = b"\xff" * 6 + struct.pack(">Q", next(NUMBERS)) * 20
    await nic.send(frame)
    with trio.fail_after(PATIENCE_S):
        while (came := await nic.receive()) != frame:
            assert came[:6] == frame[:6]
            assert len(set(struct.unpack(">20Q", came[6:]))) == 1
    return frame


async def echo_until_it_fails(nic: NetDriver, errors: list[str]) -> None:
    try:
        while True:
            await echo(nic)
    except DeviceError as error:
        errors.append(str(error))


@pytest.fixture
def a(tmp_path: Path) -> Iterator[Served]:
    with serving_card(tmp_path / "a.sock") as served:
        yield served


@REVOCATIONS
@LENDING
@WAYS
async def test_a_driver_hears_that_its_queues_are_gone_and_resumes_when_they_are_back(
    a: Served, revocation: Revocation, exported: bool, way: Way, tmp_path: Path
) -> None:
    with serving_card(tmp_path / "b.sock", revocation) as b:
        async with (
            leaving_nothing(a, b),
            client.connect(a.path) as working,
            client.connect(b.path) as session,
            open_container() as container,
        ):
            await container.attach(working)
            async with (
                lending(container, session, exported=exported) as lender,
                open_net(working, memory=lender.memory) as nic,
            ):
                frame = await echo(nic)
                data = await session.region_read(RegionIndex.BAR2, 0, SIZE)
                assert frame in data, "queues and frames lie on the other card"
                errors: list[str] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(echo_until_it_fails, nic, errors)
                    await echo_some(nic)
                    await lender.switch.off(way)
                    assert not a.maps(lender.inode)
                assert errors == [MEMORY_GONE]
                with pytest.raises(DeviceError, match=MEMORY_GONE):
                    await nic.reset()
                await lender.switch.on(way)
                await lender.back()
                await nic.reset()
                await echo(nic)
                assert a.maps(lender.inode)


async def echo_some(nic: NetDriver) -> None:
    before = nic.counters.received
    await until(lambda: nic.counters.received > before + 5)


# packets there, and rings in memory of our own


class Parted(Arena):
    """Rings in one memory, and the slots, which begin with a page, in another that comes and goes."""

    def __init__(self, rings: Arena, slots: Arena) -> None:
        super().__init__(rings.view, rings.iova)
        self.rings, self.slots = rings, slots

    def allocate(self, size: int, *, align: int = 64) -> DmaBuffer:
        part = self.slots if align == 4096 else self.rings
        return part.allocate(size, align=align)

    @property
    def present(self) -> bool:
        return True  # as far as the driver's own end can see


@LENDING
@WAYS
async def test_a_card_whose_packets_are_gone_asks_for_a_reset_or_rests(
    a: Served, exported: bool, way: Way, tmp_path: Path
) -> None:
    with serving_card(tmp_path / "b.sock") as b, PageMemory.allocate(1 << 20) as own:
        async with (
            client.connect(a.path) as working,
            client.connect(b.path) as session,
            open_container() as container,
        ):
            await container.attach(working)
            async with (
                container.mapped(None, own) as entry,
                lending(container, session, exported=exported) as lender,
            ):
                parted = Parted(Arena(own.view[:], entry.iova), lender.memory)
                async with open_net(working, memory=parted) as nic:
                    await echo(nic)
                    await lender.switch.off(way)
                    with pytest.raises(DeviceError, match="the device needs a reset"):
                        await send_into_the_void(nic)
                    await lender.switch.on(way)
                    await lender.back()
                    await nic.reset()
                    await echo(nic)
                parted.view.release()


async def send_into_the_void(nic: NetDriver) -> None:
    """Until the driver hears of it."""
    with trio.fail_after(PATIENCE_S):
        await nic.send(bytes(60))
        await nic.receive()
        raise AssertionError("a frame came back from nowhere")


# the end of one of them


@LENDING
@REVOCATIONS
async def test_a_card_goes_on_elsewhere_when_the_one_that_lends_is_killed(
    a: Served, exported: bool, revocation: Revocation, tmp_path: Path
) -> None:
    with nothing_left_open(), serving_card(tmp_path / "b.sock", revocation, stays=False) as b:
        async with client.connect(a.path) as working, open_container() as container:
            await container.attach(working)
            async with client.connect(b.path) as session:  # noqa: SIM117
                async with lending(container, session, exported=exported) as lender:
                    inode = lender.inode
                    async with open_net(working, memory=lender.memory) as nic:
                        await echo(nic)
                        errors: list[str] = []
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(echo_until_it_fails, nic, errors)
                            await echo_some(nic)
                            b.kill()
                        assert errors == [MEMORY_GONE]
                        await session.wait_end()
                        assert set(lender.memory.view[:64]) == {0xFF}
                        with pytest.raises(DeviceError, match=MEMORY_GONE):
                            await nic.reset()
                    await until(lambda: not a.maps(inode))
            async with open_net(working) as nic:
                await echo(nic)


@LENDING
async def test_the_lender_does_not_notice_that_the_other_card_is_killed(
    exported: bool, tmp_path: Path
) -> None:
    with (
        nothing_left_open(),
        serving_card(tmp_path / "a.sock", stays=False) as a,
        serving_card(tmp_path / "b.sock") as b,
    ):
        async with (
            client.connect(b.path) as session,
            open_container() as container,
            lending(container, session, exported=exported) as lender,
        ):
            async with client.connect(a.path) as working:
                await container.attach(working)
                with pytest.raises(ClientError):  # noqa: PT012
                    async with open_net(working, memory=lender.memory) as nic:
                        await echo(nic)
                        a.kill()
                        while True:
                            await echo(nic)
                await working.wait_end()
            await until(lambda: not container.sessions)
            await lender.switch.off(Way.RESET)
            await lender.switch.on()
            await lender.back()
            assert await session.region_read(RegionIndex.BAR2, 0, SIZE) == bytes(SIZE)
            with serving_card(tmp_path / "c.sock") as c:
                async with client.connect(c.path) as another:
                    await container.attach(another)
                    lender.memory.clear()
                    async with open_net(another, memory=lender.memory) as nic:
                        await echo(nic)


# three cards


@LENDING
async def test_two_cards_in_the_memory_of_a_third_go_down_together_and_a_fourth_does_not(
    a: Served, exported: bool, tmp_path: Path
) -> None:
    with (
        serving_card(tmp_path / "b.sock", Revocation.ENFORCED) as b,
        serving_card(tmp_path / "c.sock") as c,
        serving_card(tmp_path / "d.sock") as d,
    ):
        async with leaving_nothing(a, b, c, d), AsyncExitStack() as stack:
            enter = stack.enter_async_context
            container = await enter(open_container())
            sessions = [await enter(client.connect(one.path)) for one in (a, c)]
            for session in sessions:
                await container.attach(session)
            lender = await enter(lending(container, await enter(client.connect(b.path)), exported=exported))
            other = await enter(lending(container, await enter(client.connect(d.path)), exported=exported))
            nics = [
                await enter(open_net(sessions[0], memory=lender.memory)),
                await enter(open_net(sessions[1], memory=other.memory)),
            ]
            for nic in nics:
                await echo(nic)
            errors: list[str] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(echo_until_it_fails, nics[0], errors)
                await echo_some(nics[0])
                await lender.switch.off(Way.RESET)
            assert errors == [MEMORY_GONE]
            assert not a.maps(lender.inode)
            assert not c.maps(lender.inode), "whoever is attached lets go, whether it works there or not"
            await echo(nics[1])
            await lender.switch.on()
            await lender.back()
            await nics[0].reset()
            await echo(nics[0])


async def test_cards_in_each_others_memory_lose_it_by_turns(tmp_path: Path) -> None:
    with serving_card(tmp_path / "a.sock") as a, serving_card(tmp_path / "b.sock") as b:
        async with leaving_nothing(a, b), AsyncExitStack() as stack:
            enter = stack.enter_async_context
            container = await enter(open_container())
            sessions = [await enter(client.connect(one.path)) for one in (a, b)]
            for session in sessions:
                await container.attach(session)
            lenders = [await enter(lending(container, session, exported=False)) for session in sessions]
            nics = [
                await enter(open_net(session, memory=lender.memory))
                for session, lender in zip(sessions, reversed(lenders), strict=True)
            ]
            for _ in range(3):
                for number, way in enumerate((Way.COMMAND, Way.D3)):
                    lender, borrower = lenders[number], nics[1 - number]
                    await echo(borrower)
                    await lender.switch.off(way)
                    with pytest.raises(DeviceError, match=MEMORY_GONE):
                        await echo(borrower)
                    await lender.switch.on(way)
                    await lender.back()
                    await borrower.reset()
                    await echo(borrower)
                    await nics[number].reset()
                    await echo(nics[number])


async def test_memory_that_no_card_lends_any_more_cannot_be_mapped(a: Served, tmp_path: Path) -> None:
    with serving_card(tmp_path / "b.sock", stays=False) as b:
        async with (
            client.connect(a.path) as working,
            client.connect(b.path) as session,
            open_container() as container,
        ):
            await container.attach(working)
            await Switch.of(session)
            with BarMapping(session.regions[RegionIndex.BAR2], session.decoding) as mapping:
                b.kill()
                await session.wait_end()
                with pytest.raises(ContainerError):
                    await container.map(0, BarRange(mapping, 0, SIZE))
            assert container.entries == ()
