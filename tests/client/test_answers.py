"""What a server may ask of a client, on either socket."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from errno import EACCES, EFAULT, EINVAL
from typing import IO

import pytest
import trio
import trio.testing

import client
from client.session import READ_WRITE
from client.windows import Window
from protocol import Limits
from protocol.limits import MAX_OUTSTANDING, MAX_UNREAD_ANSWERS
from protocol.vfio import DmaMapFlags
from tests.client.peer import (
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    NO_REPLY,
    REGION_READ,
    REPLY,
    RESET,
    TWIN,
    Peer,
    session_with,
)
from tests.descriptors import open_fds, settled_fds


def place(address: int, count: int) -> bytes:
    """What DMA_READ and DMA_WRITE begin with."""
    return struct.pack("=QQ", address, count)


async def serve_windows(peer: Peer) -> None:
    """Accept and give up every window until the client leaves."""
    with suppress(EOFError):
        while True:
            message = await peer.next()
            for fd in message.fds:
                os.close(fd)
            peer.reply(message, b"" if message.command == DMA_MAP else message.payload)


@asynccontextmanager
async def memory_of(
    *, shared: bool = True, size: int = 8192, flags: DmaMapFlags = READ_WRITE
) -> AsyncIterator[tuple[client.DmaMemory, Peer]]:
    """A window and the peer, which is free to ask."""
    with trio.fail_after(20):
        async with session_with() as (session, peer), trio.open_nursery() as nursery:

            async def map_it() -> None:
                message = await peer.expect(DMA_MAP)
                assert len(message.fds) == shared
                for fd in message.fds:
                    os.close(fd)
                peer.reply(message)

            nursery.start_soon(map_it)
            async with client.dma_memory(session, size, iova=0x10000, shared=shared, flags=flags) as memory:
                yield memory, peer
                nursery.start_soon(serve_windows, peer)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by message alone"])
async def test_memory_is_read_and_written_by_message(shared: bool) -> None:
    async with memory_of(shared=shared) as (memory, peer):
        memory.view[100:105] = b"hello"
        peer.ask(DMA_READ, place(0x10064, 5), id=3)
        answer, errno = await peer.answered()
        assert (answer.id, answer.command, errno) == (3, DMA_READ, 0)
        assert answer.payload == place(0x10064, 5) + b"hello"
        peer.ask(DMA_WRITE, place(0x10FFE, 4) + b"abcd", id=4)
        answer, errno = await peer.answered()
        assert (answer.id, answer.command, errno) == (4, DMA_WRITE, 0)
        assert answer.payload == place(0x10FFE, 4)
        assert bytes(memory.view[0xFFD:0x1003]) == b"\0abcd\0"
        assert (memory.fd is not None) is shared


async def test_what_the_windows_do_not_allow_is_refused() -> None:
    async with memory_of(flags=DmaMapFlags.READ) as (memory, peer):
        for command, payload, errno in (
            (DMA_READ, place(0x12000, 1), EFAULT),
            (DMA_READ, place(0xFFFF, 2), EFAULT),
            (DMA_WRITE, place(0x10000, 1) + b"x", EACCES),
            (DMA_WRITE, place(0x12000, 1) + b"x", EFAULT),
        ):
            peer.ask(command, payload)
            assert (await peer.answered())[1] == errno
        assert not any(memory.view)


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (DMA_READ, place(0x10000, (1 << 20) + 1)),
        (DMA_READ, place((1 << 64) - 1, 2)),
        (DMA_READ, place(0x10000, 8) + b"x"),
        (DMA_WRITE, place(0x10000, 8) + b"x"),
        (DMA_WRITE, place(0x10000, 1 << 63)),
        (DMA_READ, b""),
    ],
    ids=["too much", "wraps", "a read with data", "less data than said", "more than said", "nothing"],
)
async def test_nonsense_is_refused_and_the_session_goes_on(command: int, payload: bytes) -> None:
    async with memory_of() as (memory, peer):
        peer.ask(command, payload)
        assert (await peer.answered())[1] == EINVAL
        assert not any(memory.view)
        peer.ask(DMA_READ, place(0x10000, 1))
        assert (await peer.answered())[1] == 0


async def test_a_transfer_of_the_largest_size_is_answered() -> None:
    async with memory_of(size=1 << 20) as (memory, peer):
        memory.view[-4:] = b"last"
        peer.ask(DMA_READ, place(0x10000, 1 << 20))
        answer, _ = await peer.answered()
        assert answer.payload[16:] == bytes(memory.view)


async def test_a_write_that_wants_no_answer_is_done() -> None:
    async with memory_of() as (_, peer):
        peer.ask(DMA_WRITE, place(0x10000, 2) + b"ab", flags=NO_REPLY)
        peer.ask(DMA_READ, place(0x10000, 2), flags=NO_REPLY)
        peer.ask(DMA_READ, place(0x10000, 3), id=9)
        answer, _ = await peer.answered()
        assert (answer.id, answer.payload[16:]) == (9, b"ab\0")


async def test_a_read_that_wants_no_answer_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with memory_of() as (_, peer):
        monkeypatch.delattr("client.windows.Windows.read")
        peer.ask(DMA_READ, place(0x10000, 8192), flags=NO_REPLY)
        peer.ask(DMA_WRITE, place(0x10000, 1) + b"x")
        assert (await peer.answered())[0].command == DMA_WRITE


async def test_questions_stand_between_a_request_and_its_answer() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        nursery.start_soon(session.reset)
        waiting = await peer.expect(RESET)
        peer.ask(DMA_READ, place(0x1000, 4), id=waiting.id)
        assert (await peer.answered())[1] == EFAULT
        peer.reply(waiting)


async def test_a_server_may_ask_while_its_answer_to_the_mapping_is_under_way() -> None:
    with trio.fail_after(20):
        async with session_with() as (session, peer), trio.open_nursery() as nursery:

            async def serve() -> None:
                message = await peer.expect(DMA_MAP)
                peer.ask(DMA_READ, place(0x10000, 1))
                assert (await peer.answered())[1] == 0
                peer.reply(message)
                message = await peer.expect(DMA_UNMAP)
                peer.ask(DMA_WRITE, place(0x10000, 1) + b"x")
                assert (await peer.answered())[1] == 0
                peer.reply(message, message.payload)
                await trio.testing.wait_all_tasks_blocked()
                peer.ask(DMA_READ, place(0x10000, 1))
                assert (await peer.answered())[1] == EFAULT

            nursery.start_soon(serve)
            async with client.dma_memory(session, 4096, iova=0x10000, shared=False):
                pass


async def test_a_window_mapped_without_a_view_cannot_be_reached_by_message() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        nursery.start_soon(session.dma_map, 0x10000, 4096)
        peer.reply(await peer.expect(DMA_MAP))
        peer.ask(DMA_READ, place(0x10000, 1))
        assert (await peer.answered())[1] == EFAULT


async def test_a_server_that_asks_for_much_and_reads_no_answers_is_left() -> None:
    async with session_with() as (session, peer):
        most = 1 << 20
        view = memoryview(bytearray(most))
        session.windows.add(Window(0x10000, most, DmaMapFlags.READ, view))
        question = struct.pack("=HHIII", 7, DMA_READ, 32, 0, 0) + place(0x10000, most)
        peer.send(question * (MAX_UNREAD_ANSWERS // most))
        await trio.testing.wait_all_tasks_blocked()
        assert not session.connection.closed
        peer.send(question)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(client.Disconnected, match="reads no answers"):
            await session.reset()


async def test_a_slow_server_that_reads_its_answers_is_not_left() -> None:
    async with session_with() as (session, peer):
        view = memoryview(bytearray(1 << 20))
        session.windows.add(Window(0x10000, 1 << 20, DmaMapFlags.READ, view))
        for _ in range(2 * MAX_UNREAD_ANSWERS >> 20):
            await session.post_write(0, 0, bytes(4096))  # something waits to be sent all the time
            peer.ask(DMA_READ, place(0x10000, 1 << 20))
            while (await peer.next()).command != DMA_READ:
                pass
        assert not session.connection.closed


@asynccontextmanager
async def twins(limits: Limits | None = None) -> AsyncIterator[tuple[client.Session, Peer, Peer]]:
    """A session with a twin socket: (session, its peer, the peer of the twin)."""
    ours, theirs = socket.socketpair()
    try:
        with trio.fail_after(20), ours:
            async with session_with(capabilities=TWIN, fds=(ours.fileno(),), limits=limits) as (
                session,
                peer,
            ):
                yield session, peer, Peer(theirs)
    finally:
        theirs.close()


async def test_questions_on_the_twin_socket_are_answered_there() -> None:
    async with twins() as (session, peer, twin), trio.open_nursery() as nursery:
        memory = bytearray(b"abcdefgh" * 512)
        nursery.start_soon(lambda: session.dma_map(0x10000, 4096, view=memoryview(memory)))
        peer.reply(await peer.expect(DMA_MAP))
        twin.ask(DMA_READ, place(0x10002, 4))
        assert (await twin.answered())[0].payload == place(0x10002, 4) + b"cdef"
        twin.ask(DMA_WRITE, place(0x10000, 3) + b"xyz")
        assert (await twin.answered())[1] == 0
        assert memory[:4] == b"xyzd"
        peer.ask(DMA_READ, place(0x10000, 3))
        assert (await peer.answered())[0].payload[16:] == b"xyz"
        assert len(session.wires) == 2


async def test_the_twin_socket_is_for_the_servers_commands_alone() -> None:
    async with twins() as (_, _, twin):
        twin.ask(REGION_READ, struct.pack("=QII", 0, 0, 4))
        assert (await twin.answered())[1] == EINVAL


async def test_a_reply_on_the_twin_socket_ends_the_session() -> None:
    async with twins() as (session, _, twin):
        twin.send(struct.pack("=HHIII", 1, DMA_READ, 16, REPLY, 0))
        assert "twin socket" in str(await session.wait_end())
        with pytest.raises(client.Disconnected, match="twin socket"):
            await session.reset()


async def test_a_twin_socket_that_is_closed_leaves_the_session() -> None:
    async with twins() as (session, peer, twin), trio.open_nursery() as nursery:
        twin.sock.shutdown(socket.SHUT_RDWR)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(session.reset)
        peer.reply(await peer.expect(RESET))


async def test_a_server_that_reads_no_answers_on_the_twin_socket_is_left() -> None:
    async with twins() as (session, _, twin):
        question = struct.pack("=HHIII", 7, DMA_READ, 32, 0, 0) + place(0x1000, 64)
        while not session.connection.closed:
            with suppress(BlockingIOError, BrokenPipeError):
                twin.send(question * 64)
            await trio.testing.wait_all_tasks_blocked()
            assert len(session.wires[1]._outbox) <= MAX_OUTSTANDING + 1
        with pytest.raises(client.Disconnected, match="reads no answers"):
            await session.reset()


async def test_nothing_of_a_twin_socket_is_left_open() -> None:
    before = settled_fds()
    async with twins():
        pass
    assert open_fds() == before


@pytest.mark.parametrize("kind", ["file", "datagram", "inet", "none"])
async def test_a_twin_socket_that_is_none_is_refused(kind: str) -> None:
    before = settled_fds()
    other: IO[str] | socket.socket
    match kind:
        case "file":
            other = os.fdopen(os.memfd_create("twin"))
        case "datagram":
            other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        case _:
            other = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    fds = () if kind == "none" else (other.fileno(),)
    ours, theirs = socket.socketpair()
    with theirs, other, trio.fail_after(20):
        peer = Peer(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.agree, TWIN, fds)
            with pytest.raises(client.ConnectError, match="twin socket"):
                await client.over_socket(ours).__aenter__()
    assert open_fds() == before


async def test_a_twin_socket_that_was_not_wanted_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with theirs, trio.fail_after(20):
        peer = Peer(theirs)

        async def agree() -> None:
            message = await peer.agree(TWIN, (theirs.fileno(),))
            assert b"twin_socket" not in message.payload

        async with trio.open_nursery() as nursery:
            nursery.start_soon(agree)
            with pytest.raises(client.ConnectError, match="nobody asked for"):
                await client.over_socket(ours, limits=Limits(twin_socket=False)).__aenter__()


async def test_a_server_that_makes_the_twin_socket_block_does_not_stop_us() -> None:
    async with twins() as (session, peer, twin), trio.open_nursery() as nursery:
        os.set_blocking(session.wires[1]._socket.fileno(), True)
        twin.ask(DMA_READ, place(0, 1))
        assert (await twin.answered())[1] == EFAULT
        nursery.start_soon(session.reset)
        peer.reply(await peer.expect(RESET))
