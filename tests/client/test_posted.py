"""Small posted writes that are gathered into REGION_WRITE_MULTI."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import client
from protocol import Limits
from protocol.limits import MAX_WRITES_PER_MESSAGE
from tests.client.peer import (
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    RESET,
    WRITE_MULTI,
    FakeRegion,
    Message,
    Peer,
)
from tests.client.peer import session_with as plain_session_with

MULTIPLE = b'{"capabilities":{"max_msg_fds":16,"write_multiple":true}}\0'
REGIONS = {0: FakeRegion(0x4000), 2: FakeRegion(1 << 20), 5: FakeRegion(0x1000, flags=1)}
BULK = bytes(64 << 10)

Write = tuple[int, int, bytes]


@asynccontextmanager
async def stalled(
    capabilities: bytes = MULTIPLE, limits: Limits | None = None
) -> AsyncIterator[tuple[client.Session, Peer]]:
    """A session whose socket is full, so that everything further waits."""
    with trio.fail_after(20):
        async with plain_session_with(capabilities=capabilities, regions=REGIONS, limits=limits) as both:
            session, _ = both
            while not session.wires[0].busy:
                await session.post_write(2, 0, BULK)
            yield both


def decode(message: Message) -> list[Write]:
    """The posted writes in a message."""
    assert message.flags == NO_REPLY
    if message.command == REGION_WRITE:
        offset, region, count = struct.unpack_from("=QII", message.payload)
        assert len(message.payload) == 16 + count
        return [(region, offset, message.payload[16:])]
    assert message.command == WRITE_MULTI
    (count,) = struct.unpack_from("=Q", message.payload)
    assert len(message.payload) == 8 + 24 * count
    writes = []
    for offset, region, size, data in struct.iter_unpack("=QII8s", message.payload[8:]):
        assert data[size:] == bytes(8 - size)
        writes.append((region, offset, data[:size]))
    return writes


async def drain(peer: Peer, session: client.Session) -> list[Message]:
    """Everything small that the session posted, up to a reset that it sends now."""
    messages: list[Message] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.reset)
        while True:
            message = await peer.next()
            if message.command == RESET:
                peer.reply(message)
                return messages
            if len(message.payload) < len(BULK):
                messages.append(message)


async def test_small_writes_that_have_to_wait_go_in_one_message() -> None:
    async with stalled() as (session, peer):
        writes = [(0, 4 * number, struct.pack("=I", number)) for number in range(100)]
        for index, offset, data in writes:
            session.post_write_now(index, offset, data)
        (message,) = await drain(peer, session)
        assert message.command == WRITE_MULTI
        assert decode(message) == writes


async def test_what_was_gathered_is_lost_with_the_session() -> None:
    async with stalled() as (session, peer):
        for number in range(3):
            session.post_write_now(0, number, b"a")
        peer.send(b"\xff" * 16)
        await session.wait_end()
        peer.sock.setblocking(False)
        taken = 0
        while session.wires[0].busy:  # a server that reads on is sent what had left before
            await trio.testing.wait_all_tasks_blocked()
            with suppress(BlockingIOError):
                while got := len(peer.sock.recv(1 << 20)):
                    taken += got
        assert taken % (32 + len(BULK)) == 0
        with pytest.raises(client.Disconnected, match="breaks the protocol"):
            session.post_write_now(0, 0, b"a")


async def test_nothing_is_gathered_while_the_server_keeps_up() -> None:
    async with plain_session_with(capabilities=MULTIPLE, regions=REGIONS) as (session, peer):
        for number in range(3):
            session.post_write_now(0, 0, bytes([number]))
        messages = await drain(peer, session)
        assert [message.command for message in messages] == [REGION_WRITE] * 3


@pytest.mark.parametrize(
    ("capabilities", "limits"),
    [
        (b'{"capabilities":{"max_msg_fds":16}}\0', None),
        (b'{"capabilities":{"max_msg_fds":16,"write_multiple":false}}\0', None),
        (MULTIPLE, Limits(write_multiple=False)),
    ],
    ids=["not said", "said no", "not wanted"],
)
async def test_nothing_is_gathered_without_agreement(capabilities: bytes, limits: Limits | None) -> None:
    async with stalled(capabilities, limits) as (session, peer):
        for number in range(3):
            session.post_write_now(0, 0, bytes([number]))
        messages = await drain(peer, session)
        assert [message.command for message in messages] == [REGION_WRITE] * 3


async def test_a_message_has_as_many_writes_as_a_server_takes() -> None:
    async with stalled() as (session, peer):
        writes = [(0, number % 64, bytes([number % 256])) for number in range(MAX_WRITES_PER_MESSAGE + 1)]
        for write in writes:
            session.post_write_now(*write)
        first, second = await drain(peer, session)
        assert len(decode(first)) == MAX_WRITES_PER_MESSAGE
        assert second.command == REGION_WRITE  # one alone needs no message of its own kind
        assert decode(first) + decode(second) == writes


@pytest.mark.parametrize(
    "odd",
    [(0, 0, b"123456789"), (0, 0, b""), (0, 0x3FFE, b"four"), (5, 0, b"1"), (3, 0, b"1"), (40, 0, b"1")],
    ids=["long", "empty", "beyond the region", "read-only", "no region", "unknown region"],
)
async def test_what_a_server_may_refuse_goes_alone_and_in_its_place(odd: Write) -> None:
    async with stalled() as (session, peer):
        for write in ((0, 0, b"a"), (0, 1, b"b"), odd, (0, 2, b"c"), (0, 3, b"d")):
            session.post_write_now(*write)
        messages = await drain(peer, session)
        assert [message.command for message in messages] == [WRITE_MULTI, REGION_WRITE, WRITE_MULTI]
        assert decode(messages[1]) == [odd]


async def test_a_request_does_not_overtake_what_was_gathered() -> None:
    async with stalled() as (session, peer), trio.open_nursery() as nursery:
        session.post_write_now(0, 0, b"a")
        session.post_write_now(0, 1, b"b")
        nursery.start_soon(session.region_read, 0, 0, 4)
        await trio.testing.wait_all_tasks_blocked()
        session.post_write_now(0, 2, b"c")
        seen: list[Message] = []
        while len(seen) < 3:
            message = await peer.next()
            if len(message.payload) < len(BULK):
                seen.append(message)
        assert [message.command for message in seen] == [WRITE_MULTI, REGION_READ, REGION_WRITE]
        peer.reply(seen[1], seen[1].payload + bytes(4))


async def test_what_was_gathered_leaves_without_another_request() -> None:
    async with stalled() as (session, peer):
        session.post_write_now(0, 0, b"a")
        session.post_write_now(0, 1, b"b")
        while True:
            message = await peer.next()
            if len(message.payload) < len(BULK):
                break
        assert decode(message) == [(0, 0, b"a"), (0, 1, b"b")]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([0, 2, 5]), st.integers(0, 0x1100), st.binary(max_size=10))))
async def test_the_order_is_that_of_the_calls(writes: list[Write]) -> None:
    async with stalled() as (session, peer):
        for write in writes:
            session.post_write_now(*write)
        got = [write for message in await drain(peer, session) for write in decode(message)]
        assert got == writes


async def test_the_data_is_that_of_the_call() -> None:
    async with stalled() as (session, peer):
        data = bytearray(b"then")
        session.post_write_now(0, 0, data)
        session.post_write_now(0, 8, memoryview(data))
        data[:] = os.urandom(4)
        (message,) = await drain(peer, session)
        assert decode(message) == [(0, 0, b"then"), (0, 8, b"then")]
