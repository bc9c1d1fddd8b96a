from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import EINVAL

import pytest
import trio

import client
from client._eventfd import is_eventfd
from protocol import Command
from protocol.limits import FIRST_ARGSZ, MAX_INFO_SIZE, MAX_QUESTIONS
from protocol.messages import IoEventFd, IoRegionFd
from tests.client.peer import IO_FDS, FakeRegion, Message, Peer, session_with
from tests.descriptors import open_fds, settled_fds

REGIONS = {0: FakeRegion(0x4000)}


def entry(offset: int, length: int, fd_index: int = 0, kind: int = 0, flags: int = 0, last: int = 0) -> bytes:
    """A sub-region, ioeventfd by default; `last` is datamatch or user_data."""
    return struct.pack("=QQIIIIQ", offset, length, fd_index, kind, flags, 0, last)


def answer(
    peer: Peer, to: Message, entries: list[bytes], fds: tuple[int, ...] = (), *, index: int = 0
) -> None:
    """A reply with these sub-regions."""
    content = b"".join(entries)
    peer.reply(to, struct.pack("=IIII", 16 + len(content), 0, index, len(entries)) + content, fds)


@asynccontextmanager
async def answered(entries: list[bytes], nr_fds: int = 1) -> AsyncIterator[client.Session]:
    """A session whose server gives these sub-regions of region 0, with as many eventfds."""
    fds = tuple(os.eventfd(0) for _ in range(nr_fds))
    try:
        with trio.fail_after(10):
            async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:

                async def serve() -> None:
                    message = await peer.expect(IO_FDS)
                    assert message.payload == struct.pack("=IIII", FIRST_ARGSZ, 0, 0, 0)
                    answer(peer, message, entries, fds)

                nursery.start_soon(serve)
                yield session
    finally:
        for fd in fds:
            os.close(fd)


async def test_parts_of_a_region_come_with_their_descriptors() -> None:
    before = settled_fds()
    entries = [entry(0x3000, 2), entry(0x3004, 0, 1), entry(0x100, 4, 1, kind=1, last=77)]
    async with answered(entries, nr_fds=2) as session:
        with await session.io_fds(0) as io_fds:
            assert len(io_fds.fds) == 2
            assert isinstance(io_fds.entries[0], IoEventFd)
            assert io_fds.entries[2] == IoRegionFd(0x100, 4, 1, user_data=77)
            assert all(is_eventfd(fd) for fd in io_fds.fds)
    assert open_fds() == before


async def test_the_eventfd_of_a_write_is_found_as_kvm_finds_it() -> None:
    entries = [
        entry(0x3000, 2, 0, flags=1, last=5),
        entry(0x3000, 2, 1, flags=1, last=6),
        entry(0x3004, 0, 2),
        entry(0x3008, 4, 3, kind=1),
    ]
    async with answered(entries, nr_fds=4) as session:
        with await session.io_fds(0) as io_fds:
            assert io_fds.find(0x3000, 2, 5) == io_fds.fds[0]
            assert io_fds.find(0x3000, 2, 6) == io_fds.fds[1]
            assert io_fds.find(0x3000, 2, 7) is None
            assert io_fds.find(0x3000, 4, 5) is None
            assert io_fds.find(0x3004, 8, 0) == io_fds.fds[2]
            assert io_fds.find(0x3005, 2, 0) is None
            assert io_fds.find(0x3008, 4, 0) is None


@pytest.mark.parametrize(
    "bad",
    [
        [entry(0x4000, 2)],
        [entry(0x4000, 0)],
        [entry(0x3FFF, 2)],
        [entry((1 << 64) - 1, 2)],
        [entry(0, 2, 1)],
        [entry(0, 2, kind=2)],
        [entry(0, 2)[:-8]],
    ],
    ids=["beyond", "beyond, empty", "across the end", "wraps", "no such descriptor", "no such kind", "short"],
)
async def test_nonsense_is_refused_and_its_descriptors_closed(bad: list[bytes]) -> None:
    before = settled_fds()
    async with answered(bad) as session:
        with pytest.raises(client.BadReplyError, match="DEVICE_GET_REGION_IO_FDS"):
            await session.io_fds(0)
    assert open_fds() == before


async def test_a_long_answer_is_asked_for_again_with_more_room() -> None:
    entries = [entry(4 * number, 2) for number in range(100)]
    fd = os.eventfd(0)
    async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(IO_FDS)
            needed = 16 + 40 * len(entries)
            peer.reply(message, struct.pack("=IIII", needed, 0, 0, len(entries)))
            message = await peer.expect(IO_FDS)
            assert struct.unpack("=IIII", message.payload)[0] == needed
            answer(peer, message, entries, (fd,))

        nursery.start_soon(serve)
        with await session.io_fds(0) as io_fds:
            assert len(io_fds.entries) == 100
    os.close(fd)


async def test_a_server_that_always_needs_more_room_is_an_error() -> None:
    async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            for number in range(MAX_QUESTIONS):
                message = await peer.expect(IO_FDS)
                peer.reply(message, struct.pack("=IIII", 1000 + number, 0, 0, 20))

        nursery.start_soon(serve)
        with pytest.raises(client.BadReplyError, match="more room each time"):
            await session.io_fds(0)


async def test_an_answer_longer_than_any_can_be_is_not_asked_for() -> None:
    async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(IO_FDS)
            peer.reply(message, struct.pack("=IIII", MAX_INFO_SIZE + 1, 0, 0, 20))

        nursery.start_soon(serve)
        with pytest.raises(client.BadReplyError, match="65537 bytes"):
            await session.io_fds(0)


async def test_no_region_and_no_such_thing_are_told() -> None:
    async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:
        for index in (1, 9, -1):
            with pytest.raises(client.ClientError, match="no region"):
                await session.io_fds(index)

        async def serve() -> None:
            peer.refuse(await peer.expect(IO_FDS), EINVAL)

        nursery.start_soon(serve)
        with pytest.raises(client.ServerError) as refusal:
            await session.io_fds(0)
        assert refusal.value.command is Command.DEVICE_GET_REGION_IO_FDS
