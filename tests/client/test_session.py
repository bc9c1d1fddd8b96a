from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from errno import EBUSY, ECONNRESET, EINVAL
from functools import partial

import pytest
import trio
import trio.testing

import client
from protocol import Command
from protocol.limits import MAX_OUTSTANDING, MAX_QUEUED, MAX_WHOLE_MESSAGE, RECEIVE_SIZE
from protocol.messages import DeviceInfo
from protocol.quirks import Overrides, Quirk
from protocol.vfio import IrqSetFlags
from tests.client.peer import (
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    ERROR,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    RESET,
    SET_IRQS,
    Message,
    Peer,
    session_with,
)
from tests.descriptors import open_fds, settled_fds


def access(message: Message) -> tuple[int, int, int]:
    """(offset, region, count) of a read or write."""
    offset, region, count = struct.unpack_from("=QII", message.payload)
    return offset, region, count


def give(peer: Peer, to: Message, data: bytes) -> None:
    """Answer a REGION_READ."""
    peer.reply(to, to.payload[:16] + data)


async def test_a_read_asks_and_gives_the_bytes() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def read() -> None:
            assert await session.region_read(7, 0x10, 4) == b"\1\2\3\4"

        nursery.start_soon(read)
        message = await peer.expect(REGION_READ)
        assert message.payload == struct.pack("=QII", 0x10, 7, 4)
        give(peer, message, b"\1\2\3\4")


async def test_requests_are_pipelined_and_answered_in_any_order() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        seen: dict[int, bytes] = {}

        async def read(offset: int) -> None:
            seen[offset] = await session.region_read(0, offset, 2)

        for offset in range(0, 40, 2):
            nursery.start_soon(read, offset)
        asked = [await peer.expect(REGION_READ) for _ in range(20)]
        assert seen == {}
        for message in reversed(asked):
            give(peer, message, struct.pack("=H", access(message)[0]))
        with trio.fail_after(5):
            while len(seen) < 20:
                await trio.testing.wait_all_tasks_blocked()
        assert all(data == struct.pack("=H", offset) for offset, data in seen.items())


async def test_long_transfers_go_in_pieces_that_the_server_takes() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        content = bytes(range(256)) * 40

        async def serve() -> None:
            for _ in range(3):
                message = await peer.expect(REGION_READ)
                offset, _, count = access(message)
                assert count <= 4096
                give(peer, message, content[offset : offset + count])
            written = b""
            for _ in range(3):
                message = await peer.expect(REGION_WRITE)
                written += message.payload[16:]
                peer.reply(message, message.payload[:16])
            assert written == content[:10000]

        nursery.start_soon(serve)
        assert await session.region_read(2, 0, 10000) == content[:10000]
        await session.region_write(2, 0, content[:10000])


async def test_a_refusal_tells_the_command_and_the_reason() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(client.ServerError, match=r"REGION_READ.*EINVAL") as refusal:
                await session.region_read(0, 0, 4)
            assert refusal.value.errno == EINVAL
            assert refusal.value.command is Command.REGION_READ

        nursery.start_soon(ask)
        peer.refuse(await peer.expect(REGION_READ), EINVAL)


@pytest.mark.parametrize("data", [b"abc", b"abcde", b""])
async def test_a_wrong_answer_fails_its_request_alone(data: bytes) -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(client.BadReplyError):
                await session.region_read(0, 0, 4)
            await session.reset()

        nursery.start_soon(ask)
        message = await peer.expect(REGION_READ)
        peer.reply(message, struct.pack("=QII", 0, 0, min(len(data), 4)) + data)
        peer.reply(await peer.expect(RESET))


async def test_a_short_read_is_not_taken_for_a_whole_one() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(client.BadReplyError, match="2 of 4"):
                await session.region_read(0, 0, 4)

        nursery.start_soon(ask)
        message = await peer.expect(REGION_READ)
        peer.reply(message, struct.pack("=QII", 0, 0, 2) + b"ab")


async def test_posted_writes_ask_for_no_answer_and_keep_their_order() -> None:
    async with session_with() as (session, peer):
        await session.post_write(0, 0x3000, b"\1\0")
        session.post_write_now(0, 0x3002, b"\2\0")
        for offset, data in ((0x3000, b"\1\0"), (0x3002, b"\2\0")):
            message = await peer.expect(REGION_WRITE)
            assert message.flags == NO_REPLY
            assert message.payload == struct.pack("=QII", offset, 0, 2) + data


async def test_a_reply_to_a_posted_write_is_ignored() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        await session.post_write(0, 0, b"\1")
        message = await peer.expect(REGION_WRITE)
        peer.reply(message, message.payload[:16])
        nursery.start_soon(session.reset)
        peer.reply(await peer.expect(RESET))


async def test_a_refusal_of_the_type_of_a_command_is_a_refusal() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(client.ServerError, match="EINVAL"):
                await session.region_read(0, 0, 4)

        nursery.start_soon(ask)
        peer.reply(await peer.expect(REGION_READ), flags=ERROR, error=EINVAL)


@pytest.mark.parametrize(
    ("quirks", "pieces"), [(None, 4), (Overrides(never=frozenset({Quirk.WHOLE_BODIES})), 1)]
)
async def test_writes_to_a_server_that_wants_whole_bodies_are_short(
    quirks: Overrides | None, pieces: int
) -> None:
    said = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":1048576}}\0'
    async with (
        session_with(capabilities=said, quirks=quirks) as (session, peer),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(session.region_write, 2, 0, bytes(100_000))
        for _ in range(pieces):
            message = await peer.expect(REGION_WRITE)
            assert pieces == 1 or 16 + len(message.payload) <= MAX_WHOLE_MESSAGE
            peer.reply(message, message.payload[:16])


async def test_a_window_whose_unmapping_is_given_up_is_not_reachable_by_message() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        nursery.start_soon(partial(session.dma_map, 0x1000, 4096, view=memoryview(bytearray(4096))))
        peer.reply(await peer.expect(DMA_MAP))
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(refuse_unmap, peer)
        with pytest.raises(client.ServerError, match="EBUSY"):
            await session.dma_unmap(0x1000, 4096)
        assert session.windows.read(0x1000, 1) == b"\0"
        with trio.move_on_after(0.01):
            await session.dma_unmap(0x1000, 4096)
        assert len(session.windows) == 0


async def refuse_unmap(peer: Peer) -> None:
    """Keep a window."""
    peer.refuse(await peer.expect(DMA_UNMAP), EBUSY)


async def test_a_session_that_is_hung_up_is_over_for_both() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(client.Disconnected, match="enough"):
                await session.reset()

        nursery.start_soon(ask)
        await peer.expect(RESET)
        session.hang_up("enough")
        with pytest.raises(EOFError):
            await peer.next()
        with pytest.raises(client.Disconnected, match="enough"):
            await session.region_read(0, 0, 1)


async def test_a_timeout_leaves_the_session_usable() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        with trio.move_on_after(0.01) as scope:
            await session.region_read(0, 0, 4)
        assert scope.cancelled_caught
        late = await peer.expect(REGION_READ)

        async def again() -> None:
            assert await session.region_read(0, 4, 4) == b"new!"

        nursery.start_soon(again)
        message = await peer.expect(REGION_READ)
        give(peer, late, b"late")
        give(peer, message, b"new!")


async def test_descriptors_in_a_late_answer_are_closed() -> None:
    async with session_with() as (session, peer):
        with trio.move_on_after(0.01):
            await session.request(Command.DEVICE_GET_INFO, DeviceInfo(16))
        late = await peer.next()
        before = settled_fds()
        spare = os.memfd_create("late")
        peer.reply(late, struct.pack("=IIII", 16, 3, 9, 5), (spare,))
        os.close(spare)
        await trio.testing.wait_all_tasks_blocked()
        assert open_fds() == before


@pytest.mark.parametrize("command", [REGION_READ, RESET])
async def test_descriptors_that_nobody_asked_for_are_closed(command: int) -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(command)
            spare = os.memfd_create("spare")
            peer.reply(message, message.payload[:16] + b"four" if command == REGION_READ else b"", (spare,))
            os.close(spare)

        before = settled_fds()
        nursery.start_soon(serve)
        with pytest.raises(client.BadReplyError, match="1 descriptors come along"):
            await (session.reset() if command == RESET else session.region_read(0, 0, 4))
        assert open_fds() == before


async def test_a_cancelled_request_that_waits_in_the_queue_still_goes_out_whole() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        payload = bytes(range(256)) * 16
        sent = 0
        with trio.move_on_after(0.05):
            while True:  # until the kernel takes no more and neither does the session
                await session.post_write(2, 0, payload)
                sent += 1
        assert sent > 10
        fd = os.memfd_create("dma")
        with trio.move_on_after(0.01):
            await session.dma_map(0x1000, 4096, fd=fd)
        os.close(fd)

        async def finish() -> None:
            await session.reset()

        nursery.start_soon(finish)
        for _ in range(sent):
            message = await peer.expect(REGION_WRITE)
            assert message.payload[16:] == payload
        following = await peer.next()
        if following.command == DMA_MAP:  # it had been queued before its task gave up
            assert len(following.fds) == 1
            os.close(following.fds[0])
            following = await peer.next()
        assert following.command == RESET
        peer.reply(following)


async def test_a_slow_server_makes_posters_wait() -> None:
    async with session_with() as (session, _):
        with trio.move_on_after(0.05) as scope:
            for _ in range(2 * MAX_QUEUED // 4096 + 1000):
                await session.post_write(2, 0, bytes(4096))
        assert scope.cancelled_caught
        assert session.wires[0].queued <= MAX_QUEUED + 8192


async def test_windows_carry_their_descriptor() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        fd = os.memfd_create("dma")
        os.truncate(fd, 8192)
        inode = os.fstat(fd).st_ino

        async def ask() -> None:
            await session.dma_map(0x10000, 8192, fd=fd, offset=0)
            await session.dma_map(0x20000, 4096)
            await session.dma_unmap(0x10000, 8192)

        nursery.start_soon(ask)
        message = await peer.expect(DMA_MAP)
        assert message.payload == struct.pack("=IIQQQ", 32, 3, 0, 0x10000, 8192)
        (got,) = message.fds
        assert os.fstat(got).st_ino == inode
        os.close(got)
        peer.reply(message)
        message = await peer.expect(DMA_MAP)
        assert message.fds == ()
        peer.reply(message)
        message = await peer.expect(DMA_UNMAP)
        assert message.payload == struct.pack("=IIQQ", 24, 0, 0x10000, 8192)
        peer.reply(message, message.payload)
    os.close(fd)


async def test_set_irqs_carries_booleans() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        flags = IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_MASK
        nursery.start_soon(session.set_irqs, 2, flags, 1, 3, b"\1\0\1")
        message = await peer.expect(SET_IRQS)
        assert message.payload == struct.pack("=IIIII", 23, 0x0A, 2, 1, 3) + b"\1\0\1"
        peer.reply(message)


async def test_what_the_server_asks_for_is_refused() -> None:
    async with session_with() as (_, peer):
        for command in (REGION_READ, RESET, 14, 99):
            peer.send(struct.pack("=HHIII", 7, command, 32, 0, 0) + struct.pack("=QQ", 0x1000, 64))
            assert await peer.next_raw() == (7, command, 16, REPLY | ERROR, EINVAL)


async def test_a_server_that_asks_and_reads_no_answers_is_left() -> None:
    question = struct.pack("=HHIII", 7, DMA_READ, 32, 0, 0) + struct.pack("=QQ", 0x1000, 64)
    async with session_with() as (session, peer):
        ended = False
        while not ended:
            with suppress(BlockingIOError):
                peer.send(question * 64)
            await trio.testing.wait_all_tasks_blocked()
            ended = session.connection.closed
            assert len(session.wires[0]._outbox) <= MAX_OUTSTANDING + 1
        with pytest.raises(client.Disconnected, match="reads no answers"):
            await session.reset()


async def test_a_server_that_never_stops_talking_does_not_keep_others_from_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stray = struct.pack("=HHIII", 1, REGION_WRITE, 16, REPLY, 0)
    said = 0

    def endless(_sock: socket.socket, buffer: bytearray, _max_fds: int) -> tuple[int, tuple[int, ...], bool]:
        nonlocal said
        said += 1
        if said > 1000:
            raise ConnectionResetError(ECONNRESET, "nobody else ever ran")
        whole = len(buffer) - len(buffer) % len(stray)
        buffer[:whole] = stray * (whole // len(stray))
        return whole, (), False

    async with session_with() as (session, peer):
        await session.post_write(0, 0, b"\1")
        monkeypatch.setattr("client._wire.receive", endless)
        monkeypatch.setattr("client._wire.RECEIVE_SIZE", RECEIVE_SIZE - RECEIVE_SIZE % 16)
        peer.send(stray)
        while not said:
            await trio.lowlevel.checkpoint()
        assert said < 100


async def test_a_poster_lets_others_run() -> None:
    async with session_with() as (session, _):
        with trio.testing.assert_checkpoints():
            await session.post_write(0, 0, b"\1")


async def test_a_descriptor_that_cannot_be_sent_fails_its_request_alone() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        good = os.memfd_create("good")
        before = settled_fds()
        flags = IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER
        with pytest.raises(OSError, match="Bad file descriptor"):
            await session.set_irqs(2, flags, 0, 2, fds=(good, -1))
        assert open_fds() == before
        assert session.connection.outstanding == 0
        os.close(good)
        nursery.start_soon(session.reset)
        peer.reply(await peer.expect(RESET))


async def test_everyone_is_told_when_the_server_leaves() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        told = 0

        async def ask(offset: int) -> None:
            nonlocal told
            with pytest.raises(client.Disconnected, match="closed the connection"):
                await session.region_read(0, offset, 4)
            told += 1

        for offset in range(5):
            nursery.start_soon(ask, offset)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            await peer.expect(REGION_READ)
        peer.sock.shutdown(socket.SHUT_RDWR)
        with trio.fail_after(5):
            while told < 5:
                await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(client.Disconnected):
            await session.reset()
        assert "closed the connection" in str(await session.wait_end())
        with pytest.raises(client.Disconnected):
            await session.post_write(0, 0, b"x")


async def test_who_waits_for_room_is_told_that_the_server_takes_no_more() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        while session.wires[0].queued <= MAX_QUEUED:
            session.post_write_now(2, 0, bytes(4096))
        told = trio.Event()

        async def ask() -> None:
            with pytest.raises(client.Disconnected, match="Broken pipe"):
                await session.reset()
            told.set()

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        peer.sock.shutdown(socket.SHUT_RD)  # it might still say something
        while peer.sock.recv(1 << 20):
            pass
        with trio.fail_after(5):
            await told.wait()


async def test_answers_given_before_leaving_still_count() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            assert await session.region_read(0, 0, 4) == b"last"

        nursery.start_soon(ask)
        give(peer, await peer.expect(REGION_READ), b"last")
        peer.sock.shutdown(socket.SHUT_RDWR)


async def test_a_server_that_breaks_the_protocol_ends_the_session() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(client.Disconnected, match="breaks the protocol"):
                await session.reset()

        nursery.start_soon(ask)
        await peer.expect(RESET)
        peer.send(struct.pack("=HHIII", 999, RESET, 16, REPLY, 0))


async def test_nothing_is_left_open_at_the_end() -> None:
    before = settled_fds()
    async with session_with():
        pass
    assert open_fds() == before


async def test_an_exception_of_the_block_comes_out_as_itself() -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)

    async def serve() -> None:
        await peer.agree()
        await peer.describe({})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises(KeyError, match="mine"):
            async with client.over_socket(ours):
                raise KeyError("mine")
    theirs.close()
