import errno
import os
import socket
import struct
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from device.errors import DeviceError
from device.function import ResetKind
from protocol.limits import KEPT_REQUEST, MAX_KEPT
from server import SessionLimits
from tests.server.answering import INFO, IOVA, memory, reply_to, said, say
from tests.server.raw import (
    DMA_MAP,
    DMA_READ,
    DMA_WRITE,
    ERROR,
    GET_INFO,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    RawClient,
    access,
    dma,
    message,
    version,
)
from tests.server.world import PAGE, World, world

# --- a handler asks, in the trio thread: what the client says beforehand is there when it looks


@pytest.fixture
async def asking(served: World) -> World:
    """A card whose registers below 128 are found in the client's memory."""
    served.card.registers.answers = partial(from_memory, served)
    return served


def from_memory(served: World, offset: int) -> int:
    if offset >= 128:
        return offset
    return int.from_bytes(memory(served).read(IOVA + offset, 4), "little")


async def test_a_handler_may_read_memory_before_it_answers(asking: World) -> None:
    client = await asking.client()
    await client.send(message(REGION_READ, access(0, 0, 4), message_id=7) + reply_to(0, IOVA, b"abcd"))
    assert (await said(client)).payload == struct.pack("=QQ", IOVA, 4)
    answer = await said(client)
    assert (answer.message_id, answer.payload[16:]) == (7, b"abcd")
    served = await client.read(0, 128, 4)
    assert served == struct.pack("=I", 128)


async def test_what_is_asked_meanwhile_keeps_its_order(asking: World) -> None:
    client = await asking.client()
    await client.send(
        message(REGION_READ, access(0, 0, 4), message_id=1)
        + message(REGION_WRITE, access(0, 2, 4) + b"1111", flags=NO_REPLY)
        + message(REGION_READ, access(0, 2, 4), message_id=2)
        + message(GET_INFO, INFO, message_id=3)
        + message(99, message_id=4)
        + reply_to(0, IOVA, b"abcd")
        + message(REGION_READ, access(4, 2, 4), message_id=5)
    )
    got = [await said(client) for _ in range(6)]
    assert [(one.command, one.message_id) for one in got] == [
        (DMA_READ, 0),
        (REGION_READ, 1),
        (REGION_READ, 2),
        (GET_INFO, 3),
        (99, 4),
        (REGION_READ, 5),
    ]
    assert [got[at].payload[16:] for at in (1, 2)] == [b"abcd", b"1111"]


async def test_half_a_request_may_stand_behind_the_answer(asking: World) -> None:
    client = await asking.client()
    half = message(REGION_READ, access(0, 2, 4), message_id=2)
    await client.send(message(REGION_READ, access(0, 0, 4)) + reply_to(0, IOVA, b"abcd") + half[:20])
    assert [(await said(client)).command for _ in range(2)] == [DMA_READ, REGION_READ]
    await client.send(half[20:])
    assert (await said(client)).message_id == 2


async def test_a_handler_that_the_engine_called_reads_memory_too(asking: World) -> None:
    client = await asking.client()
    fd = os.eventfd(0)  # makes it a message for the engine, and ends what the server receives at once
    say(
        client,
        (message(REGION_READ, access(0, 0, 4), message_id=1), [fd]),
        (message(GET_INFO, INFO, message_id=2) + reply_to(0, IOVA, b"abcd"), []),
    )
    os.close(fd)
    got = [await said(client) for _ in range(3)]
    assert [(one.command, one.message_id) for one in got] == [(DMA_READ, 0), (REGION_READ, 1), (GET_INFO, 2)]
    assert got[1].payload[16:] == b"abcd"


async def test_a_descriptor_that_comes_meanwhile_is_its_messages(asking: World) -> None:
    client = await asking.client()
    fd = os.memfd_create("guest")
    os.truncate(fd, PAGE)
    say(
        client,
        (message(REGION_READ, access(0, 0, 4), message_id=1), []),
        (message(DMA_MAP, dma(0, PAGE), message_id=2), [fd]),
        (reply_to(0, IOVA, b"abcd"), [fd]),
    )
    os.close(fd)
    assert [(await said(client)).message_id for _ in range(3)] == [0, 1, 2]
    asking.function.dma.write(0, b"x")


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EIO])
async def test_what_the_client_refuses_a_handler_fails_its_request(asking: World, number: int) -> None:
    client = await asking.client()
    refusal = struct.pack("=HHIII", 0, DMA_READ, 16, REPLY | ERROR, number)
    await client.send(message(REGION_READ, access(0, 0, 4)) + refusal + message(GET_INFO, INFO))
    got = [await said(client) for _ in range(3)]
    assert [(one.command, one.error) for one in got] == [(DMA_READ, 0), (REGION_READ, number), (GET_INFO, 0)]


async def test_a_handler_gives_up_and_the_session_goes_on(tmp_path: Path) -> None:
    async with world(tmp_path, limits=SessionLimits(dma_deadline=0.02)) as served:
        served.card.registers.answers = partial(from_memory, served)
        client = await served.client()
        await client.send(message(REGION_READ, access(0, 0, 4)) + message(GET_INFO, INFO))
        got = [await said(client) for _ in range(3)]
        assert [(one.command, one.error) for one in got] == [
            (DMA_READ, 0),
            (REGION_READ, errno.ETIMEDOUT),
            (GET_INFO, 0),
        ]
        await client.send(reply_to(0, IOVA, b"late"))
        await client.do(GET_INFO, INFO)
        await client.send(message(REGION_READ, access(0, 0, 4)) + reply_to(1, IOVA, b"soon"))
        assert (await said(client)).command == DMA_READ
        assert (await said(client)).payload[16:] == b"soon"


@pytest.mark.parametrize("road", ["drain", "engine"])
async def test_what_a_handler_gave_up_to_send_is_sent_whole_before_its_answer(
    tmp_path: Path, road: str
) -> None:
    data = os.urandom(1 << 20)
    stream = bytearray()

    async with world(tmp_path, limits=SessionLimits(dma_deadline=0.02)) as served:
        client = await served.client()
        with socket.socket(fileno=os.dup(client.socket.fileno())) as same:

            def write(offset: int) -> int:
                try:
                    memory(served).write(IOVA, data)
                finally:
                    stream.extend(
                        same.recv(1 << 20)
                    )  # in time for the answer to find room, were it not for the rest
                return 0

            served.card.registers.answers = write
            fd = os.eventfd(0)
            await client.send(message(REGION_READ, access(0, 0, 4)), [fd] if road == "engine" else [])
            os.close(fd)
            while len(stream) < 32 + len(data) + 16:
                await trio.lowlevel.wait_readable(same)
                stream += same.recv(1 << 20)
        head = struct.pack("=QQ", IOVA, len(data))
        refusal = struct.pack("=HHIII", 1, REGION_READ, 16, REPLY | ERROR, errno.ETIMEDOUT)
        assert stream == message(DMA_WRITE, head + data, message_id=0) + refusal
        await client.send(message(DMA_WRITE, head, message_id=0, flags=REPLY))
        await client.do(GET_INFO, INFO)


async def test_a_client_that_leaves_its_server_waiting_is_gone(asking: World) -> None:
    refusals: list[int | None] = []

    def answers(offset: int) -> int:
        try:
            return from_memory(asking, offset)
        except DeviceError as error:
            refusals.append(error.errno)
            raise

    asking.card.registers.answers = answers
    client = await asking.client()
    say(client, (message(REGION_READ, access(0, 0, 4)) + message(GET_INFO, INFO), []))
    client.close()
    await asking.client()
    assert refusals == [errno.ENOTCONN], "it is not waited for until it is late"
    assert asking.card.resets == [ResetKind.LOST_CLIENT]


async def test_a_client_that_breaks_the_protocol_meanwhile_is_left(asking: World) -> None:
    client = await asking.client()
    await client.send(
        message(REGION_READ, access(0, 0, 4))
        + message(GET_INFO, INFO)
        + message(GET_INFO, INFO, message_id=9, size=1)
    )
    got = [await said(client) for _ in range(4)]
    assert [(one.command, one.message_id, one.error) for one in got] == [
        (DMA_READ, 0, 0),
        (REGION_READ, 1, errno.ENOTCONN),
        (GET_INFO, 1, 0),
        (GET_INFO, 9, errno.EINVAL),
    ]
    assert await client.hung_up()


@pytest.mark.parametrize(("too_many", "fds"), [(0, 0), (1, 0), (0, 1)])
async def test_so_much_is_kept_for_a_handler_that_waits_and_no_more(
    asking: World, too_many: int, fds: int
) -> None:
    most = MAX_KEPT // KEPT_REQUEST
    fd = os.eventfd(0)

    def is_answered() -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(os.fspath(asking.path))
            try:
                client.sendall(version())
                client.recv(4096)
                client.sendall(message(REGION_READ, access(0, 0, 4)))
                for _ in range(most - 1 + too_many - fds):
                    client.sendall(message(GET_INFO, INFO, flags=NO_REPLY))
                if fds:
                    socket.send_fds(client, [message(GET_INFO, INFO, flags=NO_REPLY)], [fd])
                client.sendall(reply_to(0, IOVA, b"abcd") + message(GET_INFO, INFO))
                with client.makefile("rb") as stream:
                    return len(stream.read(32 + 36 + 32)) == 32 + 36 + 32
            except (BrokenPipeError, ConnectionResetError):
                return False

    try:
        assert await trio.to_thread.run_sync(is_answered) == (not too_many and not fds)
    finally:
        os.close(fd)


async def test_another_task_of_the_trio_thread_may_read_memory(served: World, client: RawClient) -> None:
    await client.do(GET_INFO, INFO)
    await trio.testing.wait_all_tasks_blocked()
    say(client, (message(GET_INFO, INFO, message_id=7) + reply_to(0, IOVA, b"abcd"), []))
    assert memory(served).read(IOVA, 4) == b"abcd"
    assert [(await said(client)).command for _ in range(2)] == [DMA_READ, GET_INFO]
    await client.read(0, 0, 4)
