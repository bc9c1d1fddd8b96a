from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

import client
from client.trapping import Trapping
from tests.client.bar_files import memory
from tests.client.peer import NO_REPLY, REGION_READ, REGION_WRITE, FakeRegion, Message, Peer, session_with
from tests.client.test_connecting import sparse

MAPPED = 0x1000


@asynccontextmanager
async def device() -> AsyncIterator[tuple[client.Session, list[Message]]]:
    """A session with a device that answers accesses, and those that came. BAR 0, BAR 5 and the ROM may be
    mapped in part.
    """
    came: list[Message] = []

    async def serve(peer: Peer) -> None:
        while True:
            message = await peer.next()
            came.append(message)
            assert message.command in (REGION_READ, REGION_WRITE)
            if message.flags != NO_REPLY:
                data = (
                    bytes(struct.unpack("=I", message.payload[12:16])[0])
                    if message.command == REGION_READ
                    else b""
                )
                peer.reply(message, message.payload[:16] + data)

    with memory(0x2000) as fd:
        region = FakeRegion(0x2000, 7, sparse((MAPPED, 0x1000)), (fd,))
        async with (
            session_with(regions=dict.fromkeys((0, 5, 6, 7), region)) as (session, peer),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(serve, peer)
            yield session, came
            nursery.cancel_scope.cancel()


def test_a_subscription_ends_with_its_block() -> None:
    trapping = Trapping()
    told: list[str] = []

    def fail() -> None:
        with trapping.subscribed(lambda _: told.append("one")):
            trapping.done(trapping.begin())
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert len(trapping) == 0
    trapping.done(trapping.begin())
    assert told == ["one"]


def test_a_subscriber_may_leave_while_all_are_told() -> None:
    trapping = Trapping()
    told: list[str] = []

    def leave(number: int) -> None:
        told.append("leaving")
        subscription.close()

    subscription = ExitStack()
    subscription.enter_context(trapping.subscribed(leave))
    with trapping.subscribed(lambda _: told.append("staying")):
        trapping.done(trapping.begin())
        trapping.done(trapping.begin())
    assert told == ["leaving", "staying", "staying"]


@pytest.mark.parametrize("mapped", [True, False])
async def test_each_access_by_message_is_told_after_it_was_answered(mapped: bool) -> None:
    async with device() as (session, came):
        told: list[int] = []
        with (
            client.Bar(session, 0, map=mapped) as bar,
            session.trapping.subscribed(lambda _: told.append(len(came))),
        ):
            await bar.read(0, 4)
            assert told == [1]
            await bar.write(0, 4, 7)
            assert told == [1, 2]
            bar.post(0, 4, 7)
            assert told == [1, 2, 2], "it is on its way"


async def test_accesses_are_told_in_the_order_of_their_ends_with_the_number_of_their_beginning() -> None:
    async with session_with(regions={0: FakeRegion(0x100)}) as (session, peer):
        told: list[int] = []
        bar = client.Bar(session, 0)
        with session.trapping.subscribed(told.append):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bar.read, 0, 4)
                first = await peer.next()
                nursery.start_soon(bar.read, 4, 4)
                second = await peer.next()
                assert session.trapping.begun == 2
                assert told == []
                peer.reply(second, second.payload + bytes(4))
                await trio.testing.wait_all_tasks_blocked()
                bar.post(8, 4, 0)
                peer.reply(first, first.payload + bytes(4))
            assert told == [2, 3, 1]


async def test_mapped_accesses_are_told_to_nobody_while_they_are_mapped() -> None:
    async with device() as (session, came):
        told: list[int] = []
        with client.Bar(session, 0) as bar, session.trapping.subscribed(lambda _: told.append(1)):
            await bar.write(MAPPED, 4, 7)
            bar.post(MAPPED + 4, 4, 8)
            assert await bar.read(MAPPED, 4) == 7
            assert not told
            session.trapping.mapped = False
            assert await bar.read(MAPPED, 4) == 0, "what the server says"
            await bar.write(MAPPED, 4, 9)
            bar.post(MAPPED, 4, 9)
            assert len(told) == 3
            session.trapping.mapped = True
            assert await bar.read(MAPPED, 4) == 7
            assert len(told) == 3
        assert len(came) <= 3


@pytest.mark.parametrize("index", [6, 7])
async def test_rom_and_configuration_space_are_no_bars(index: int) -> None:
    async with device() as (session, came):
        told: list[int] = []
        session.trapping.mapped = False
        with client.Bar(session, index) as region, session.trapping.subscribed(lambda _: told.append(1)):
            await region.read(0, 4)
            await region.write(0, 4, 1)
            region.post(0, 4, 1)
            assert len(came) >= 2
            await region.write(MAPPED, 4, 1)
            assert await region.read(MAPPED, 4) == 1, "mapped, as ever"
        assert not told


async def test_the_last_bar_is_one() -> None:
    async with device() as (session, _):
        told: list[int] = []
        with client.Bar(session, 5) as bar, session.trapping.subscribed(lambda _: told.append(1)):
            await bar.read(0, 4)
        assert told


async def test_an_access_of_the_session_itself_is_nobodys_affair() -> None:
    async with device() as (session, _):
        told: list[int] = []
        with session.trapping.subscribed(lambda _: told.append(1)):
            await session.region_read(0, 0, 4)
            await session.region_write(0, 0, os.urandom(4))
            await session.post_write(0, 0, os.urandom(4))
        assert not told
