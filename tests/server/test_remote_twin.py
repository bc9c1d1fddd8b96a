import contextlib
import errno
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial

import pytest
import trio
import trio.testing

from device.errors import DeviceError
from device.function import PciFunction
from tests.server.answering import INFO, IOVA, OVERTAKERS, Worker, give_up, granted, memory, overtake, said
from tests.server.raw import (
    DMA_MAP,
    DMA_READ,
    GET_INFO,
    REPLY,
    RawClient,
    dma,
    message,
    version,
)
from tests.server.world import PAGE, World

# --- over a socket of its own


@dataclass
class Twin:
    """A client with a second socket."""

    main: RawClient
    second: RawClient


@pytest.fixture
async def twin(served: World) -> AsyncIterator[Twin]:
    client = await served.connect()
    reply = await client.negotiate({"max_msg_fds": 8, "twin_socket": {"supported": True}})
    (fd,) = reply.fds
    agreed = json.loads(reply.payload[4:-1])["capabilities"]
    assert agreed["twin_socket"] == {"supported": True, "fd_index": 0}
    with trio.socket.from_stdlib_socket(socket.socket(fileno=fd)) as second:
        await client.do(GET_INFO, INFO)
        yield Twin(client, RawClient(second))


async def test_only_who_wants_a_second_socket_gets_one(served: World) -> None:
    for capabilities in ({}, {"twin_socket": {"supported": False}}, {"max_msg_fds": 0, "twin_socket": {}}):
        client = await served.connect()
        reply = await client.negotiate(capabilities)
        assert not reply.fds
        assert "twin_socket" not in json.loads(reply.payload[4:-1])["capabilities"]
        client.close()


async def test_dma_goes_over_the_second_socket(served: World, twin: Twin, nursery: trio.Nursery) -> None:
    reader = Worker(nursery, partial(memory(served).read, IOVA, 4))
    request = await said(twin.second)
    assert (request.command, request.payload) == (DMA_READ, struct.pack("=QQ", IOVA, 4))
    await twin.main.do(GET_INFO, INFO)
    await twin.second.send(granted(request, b"abcd"))
    assert await reader.outcome() == b"abcd"
    writer = Worker(nursery, partial(memory(served).write, IOVA, b"abcd"))
    request = await said(twin.second)
    assert request.payload[16:] == b"abcd"
    await twin.second.send(granted(request))
    assert await writer.outcome() is None


@pytest.mark.parametrize("by", OVERTAKERS, ids=["reset", "flr", "stop", "unmap"])
async def test_nothing_is_asked_for_that_a_reset_or_an_unmap_has_overtaken(
    served: World, twin: Twin, nursery: trio.Nursery, by: Callable[[PciFunction], object]
) -> None:
    await twin.main.do(DMA_MAP, dma(IOVA, PAGE))
    road = memory(served)
    write = partial(served.function.dma.write, IOVA, b"late")
    assert await overtake(served, by, write) == errno.ECANCELED
    reader = Worker(nursery, partial(road.read, IOVA, 4))
    request = await said(twin.second)
    assert request.command == DMA_READ
    await twin.second.send(granted(request, b"abcd"))
    assert await reader.outcome() == b"abcd"


async def test_threads_take_turns_on_the_second_socket(
    served: World, twin: Twin, nursery: trio.Nursery
) -> None:
    workers = {n: Worker(nursery, partial(memory(served).read, n, 1)) for n in range(5)}
    for _ in workers:
        request = await said(twin.second)
        await twin.second.send(granted(request, bytes([request.unpack("Q")[0]])))
    assert [await worker.outcome() for worker in workers.values()] == [bytes([n]) for n in range(5)]


async def test_an_answer_on_the_wrong_socket_ends_the_session(
    served: World, twin: Twin, nursery: trio.Nursery
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    await twin.main.send(granted(await said(twin.second), b"abcd"))
    assert await worker.outcome() == errno.ENOTCONN
    assert await twin.main.hung_up()


async def test_a_request_on_the_second_socket_is_refused(
    served: World, twin: Twin, nursery: trio.Nursery
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    request = await said(twin.second)
    fd = os.eventfd(0)
    await twin.second.send(message(GET_INFO, INFO, message_id=9), [fd])
    os.close(fd)
    refusal = await said(twin.second)
    assert (refusal.command, refusal.message_id, refusal.error) == (GET_INFO, 9, errno.EINVAL)
    await twin.second.send(granted(request, b"abcd"))
    assert await worker.outcome() == b"abcd"


async def test_who_asks_on_the_second_socket_and_takes_no_answers_loses_it(
    served: World, twin: Twin, nursery: trio.Nursery
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    await said(twin.second)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while True:
            await twin.second.send(message(GET_INFO, INFO) * 1000)
    assert await worker.outcome() == errno.ENOTCONN
    await twin.main.do(GET_INFO, INFO)


@pytest.mark.parametrize("leave", [True, False], ids=["hangs up", "talks nonsense"])
async def test_a_second_socket_that_ends_takes_only_the_memory_along(
    served: World, twin: Twin, nursery: trio.Nursery, leave: bool
) -> None:
    remote = memory(served)
    worker = Worker(nursery, partial(remote.read, IOVA, 4))
    await said(twin.second)
    if leave:
        twin.second.close()
    else:
        await twin.second.send(message(DMA_READ, b"", flags=REPLY, size=3))
    assert await worker.outcome() == errno.ENOTCONN
    assert await Worker(nursery, partial(remote.read, IOVA, 4)).outcome() == errno.ENOTCONN
    await twin.main.do(GET_INFO, INFO)


async def test_the_end_of_the_session_wakes_all_who_wait_for_the_second_socket(
    served: World, twin: Twin, nursery: trio.Nursery
) -> None:
    remote = memory(served)
    workers = [Worker(nursery, partial(remote.read, IOVA, 4)) for _ in range(3)]
    await said(twin.second)
    twin.main.close()
    for worker in workers:
        assert await worker.outcome() == errno.ENOTCONN
    assert await twin.second.hung_up()
    with pytest.raises(DeviceError) as refusal:
        remote.read(IOVA, 4)
    assert refusal.value.errno == errno.ENOTCONN


async def test_a_late_answer_on_the_second_socket_is_dropped(
    served: World, twin: Twin, nursery: trio.Nursery
) -> None:
    data = os.urandom(1 << 20)
    await give_up(served, nursery, partial(memory(served).write, IOVA, data))
    reader = Worker(nursery, partial(memory(served).read, IOVA, 1))
    request = await said(twin.second)
    assert request.payload[16:] == data
    await twin.second.send(granted(request))
    await twin.second.send(granted(await said(twin.second), b"a"))
    assert await reader.outcome() == b"a"


async def test_a_second_socket_ends_with_a_session_that_breaks_at_once(served: World) -> None:
    client = await served.connect()
    await client.send(
        version({"max_msg_fds": 8, "twin_socket": {"supported": True}}) + message(GET_INFO, INFO, size=1)
    )
    (fd,) = (await said(client)).fds
    with trio.socket.from_stdlib_socket(socket.socket(fileno=fd)) as second:
        assert await RawClient(second).hung_up()
    assert (await said(client)).error == errno.EINVAL
    assert await client.hung_up()


async def test_a_client_is_let_go_if_there_is_no_descriptor_for_its_second_socket(
    served: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    client = await served.connect()
    monkeypatch.setattr("server.session.socket.socketpair", none_left)
    await client.send(version({"max_msg_fds": 8, "twin_socket": {"supported": True}}))
    assert await client.hung_up()
    assert "no second socket for it" in caplog.text
