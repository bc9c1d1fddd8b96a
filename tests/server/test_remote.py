import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from device.errors import DeviceError
from device.function import PciFunction
from protocol.limits import MAX_DMA_UNANSWERED, Limits
from protocol.quirks import Overrides, Quirk
from server import SessionLimits, serve
from server._remote import InBandMemory
from server.session import Session
from tests.server.answering import (
    INFO,
    IOVA,
    OVERTAKERS,
    Worker,
    give_up,
    granted,
    memory,
    overtake,
    refused,
    said,
    say,
)
from tests.server.raw import (
    DMA_MAP,
    DMA_READ,
    DMA_WRITE,
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

# --- a worker thread asks, over the session's socket


async def test_a_worker_reads_the_clients_memory(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    request = await said(client)
    assert (request.command, request.flags) == (DMA_READ, 0)
    assert request.payload == struct.pack("=QQ", IOVA, 4)
    await client.send(granted(request, b"abcd"))
    assert await worker.outcome() == b"abcd"


async def test_a_worker_writes_the_clients_memory(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    worker = Worker(nursery, partial(memory(served).write, IOVA, b"abcd"))
    request = await said(client)
    assert (request.command, request.payload) == (DMA_WRITE, struct.pack("=QQ", IOVA, 4) + b"abcd")
    assert not worker.over.is_set()
    await client.send(granted(request))
    assert await worker.outcome() is None


async def test_requests_are_answered_while_the_client_owes_an_answer(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    request = await said(client)
    await client.do(GET_INFO, INFO)
    await client.read(0, 0, 4)
    await client.send(message(REGION_READ, access(0, 0, 4), message_id=7) + granted(request, b"abcd"))
    assert (await said(client)).message_id == 7
    assert await worker.outcome() == b"abcd"


async def test_answers_may_come_in_any_order(served: World, client: RawClient, nursery: trio.Nursery) -> None:
    workers = {n: Worker(nursery, partial(memory(served).read, n, 1)) for n in range(8)}
    requests = [await said(client) for _ in workers]
    for request in reversed(requests):
        iova = request.unpack("Q")[0]
        await client.send(granted(request, bytes([iova])))
    assert [await worker.outcome() for worker in workers.values()] == [bytes([n]) for n in range(8)]


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EINVAL, errno.EPERM])
async def test_a_client_that_refuses_is_believed(
    served: World, client: RawClient, nursery: trio.Nursery, number: int
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    await client.send(refused(await said(client), number))
    assert await worker.outcome() == number


@pytest.mark.parametrize(
    "lie",
    [
        struct.pack("=QQ", IOVA, 4) + b"abc",
        struct.pack("=QQ", IOVA, 3) + b"abc",
        struct.pack("=QQ", IOVA, 5) + b"abcde",
        struct.pack("=QQ", IOVA + 1, 4) + b"abcd",
        b"",
    ],
)
async def test_an_answer_to_something_else_fails_the_access_alone(
    served: World, client: RawClient, nursery: trio.Nursery, lie: bytes
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    request = await said(client)
    await client.send(message(DMA_READ, lie, message_id=request.message_id, flags=REPLY))
    assert await worker.outcome() == errno.EIO
    await client.do(GET_INFO, INFO)


async def test_descriptors_in_an_answer_are_closed(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    worker = Worker(nursery, partial(memory(served).read, IOVA, 4))
    fd = os.eventfd(0)
    await client.send(granted(await said(client), b"abcd"), [fd])
    os.close(fd)
    assert await worker.outcome() == b"abcd"  # and the fixture counts what is open at the end


async def test_an_answer_that_comes_too_late_is_dropped(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    await give_up(served, nursery, partial(memory(served).read, IOVA, 4))
    await client.send(granted(await said(client), b"abcd"))
    await client.do(GET_INFO, INFO)
    another = Worker(nursery, partial(memory(served).read, IOVA, 4))
    request = await said(client)
    await client.send(granted(request, b"efgh"))
    assert await another.outcome() == b"efgh"


async def test_a_client_owes_so_many_answers_and_no_more(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    for _ in range(MAX_DMA_UNANSWERED):
        await give_up(served, nursery, partial(memory(served).read, IOVA, 4))
        await said(client)
    assert await Worker(nursery, partial(memory(served).read, 0, 1)).outcome() == errno.EBUSY
    await client.do(GET_INFO, INFO)


async def test_who_waits_is_told_at_once_that_the_client_has_left(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    remote = memory(served)
    workers = [Worker(nursery, partial(remote.read, IOVA, 4)) for _ in range(3)]
    for _ in workers:
        await said(client)
    client.close()
    for worker in workers:
        assert await worker.outcome() == errno.ENOTCONN
    assert served.function.dma.remote is None
    assert await Worker(nursery, partial(remote.write, IOVA, b"x")).outcome() == errno.ENOTCONN
    with pytest.raises(DeviceError) as refusal:
        remote.read(IOVA, 4)
    assert refusal.value.errno == errno.ENOTCONN


@pytest.mark.parametrize("by", OVERTAKERS, ids=["reset", "flr", "stop", "unmap"])
async def test_nothing_is_asked_for_that_a_reset_or_an_unmap_has_overtaken(
    served: World, client: RawClient, by: Callable[[PciFunction], object]
) -> None:
    await client.do(DMA_MAP, dma(IOVA, PAGE))
    write = partial(served.function.dma.write, IOVA, b"late")
    assert await overtake(served, by, write) == errno.ECANCELED
    await client.do(GET_INFO, INFO)  # and no DMA_WRITE before its reply


async def test_there_is_no_memory_before_version_and_for_a_client_that_takes_no_data(served: World) -> None:
    client = await served.connect()
    await trio.testing.wait_all_tasks_blocked()
    assert served.function.dma.remote is None
    (await client.negotiate({"max_msg_fds": 8, "max_data_xfer_size": 0})).close()
    await client.do(GET_INFO, INFO)
    assert served.function.dma.remote is None


async def test_what_is_asked_for_at_once_is_what_both_ends_take(served: World) -> None:
    client = await served.connect()
    (await client.negotiate({"max_msg_fds": 8, "max_data_xfer_size": 4096})).close()
    await client.do(GET_INFO, INFO)
    assert served.function.dma.remote_limit == 4096
    with pytest.raises(DeviceError) as refusal:
        memory(served).read(0, 4097)
    assert refusal.value.errno == errno.EINVAL


async def test_a_long_write_is_not_cut_by_replies(
    served: World, client: RawClient, nursery: trio.Nursery
) -> None:
    data = os.urandom(1 << 20)
    worker = Worker(nursery, partial(memory(served).write, IOVA, data))
    await trio.testing.wait_all_tasks_blocked(0.01)
    await client.send(message(REGION_READ, access(0, 0, 4), message_id=7) + message(GET_INFO, INFO) * 20)
    got = [await said(client) for _ in range(22)]
    (request,) = [one for one in got if one.command == DMA_WRITE]
    assert request.payload[16:] == data
    assert sum(one.command == GET_INFO for one in got) == 20
    await client.send(granted(request))
    assert await worker.outcome() is None


async def test_a_client_that_takes_no_requests_is_dropped(
    tmp_path: Path, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, limits=SessionLimits(send_deadline=0.1)) as served:
        await served.client()
        worker = Worker(nursery, partial(memory(served).write, IOVA, bytes(1 << 20)))
        assert await worker.outcome() == errno.ENOTCONN
    assert "it takes no messages" in caplog.text


# --- clients with ways of their own

QEMU = {
    "max_msg_fds": 16,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "write_multiple": True,
    "migration": {"pgsize": 4096},
}


async def as_qemu(client: RawClient) -> None:
    """Agree on a version in QEMU's words."""
    await client.send(version(QEMU, minor=0))
    assert not (await said(client)).fds


async def work_as_qemu(served: World, client: RawClient, nursery: trio.Nursery) -> None:
    """Read and write memory by messages whose count has 4 bytes, and whose length is as if it had 8."""
    await client.do(GET_INFO, INFO)
    writer = Worker(nursery, partial(memory(served).write, IOVA, b"abcd"))
    request = await said(client)
    assert request.payload == struct.pack("=QI", IOVA, 4) + b"abcd" + bytes(4)
    await client.send(message(DMA_WRITE, message_id=request.message_id, flags=REPLY))
    assert await writer.outcome() is None
    reader = Worker(nursery, partial(memory(served).read, IOVA, 4))
    request = await said(client)
    shifted = struct.pack("=QI", IOVA, 4) + b"efgh" + bytes(4)
    await client.send(message(DMA_READ, shifted, message_id=request.message_id, flags=REPLY))
    assert await reader.outcome() == b"efgh"


async def test_qemu_is_spoken_to_in_its_own_way(served: World, nursery: trio.Nursery) -> None:
    client = await served.connect()
    await as_qemu(client)
    await work_as_qemu(served, client, nursery)


@pytest.mark.parametrize("early", [True, False], ids=["4 bytes early", "in their place"])
@pytest.mark.parametrize("content", [bytes(8) + b"abcd" + bytes(4), bytes(5) + b"z" + bytes(4), bytes(10)])
async def test_what_qemus_first_answer_leaves_open_is_asked_again(
    served: World, nursery: trio.Nursery, content: bytes, early: bool
) -> None:
    client = await served.connect()
    await as_qemu(client)
    asked = 0

    async def answer() -> None:
        nonlocal asked
        while True:
            request = await said(client)
            address, count = struct.unpack("=QQ", request.payload)
            part = content[address - IOVA :][:count]
            assert len(part) == count
            asked += 1
            head = request.payload[:12]
            data = head + part + bytes(4) if early else request.payload + part
            await client.send(message(DMA_READ, data, message_id=request.message_id, flags=REPLY))

    async with trio.open_nursery() as answering:
        answering.start_soon(answer)
        reader = Worker(nursery, partial(memory(served).read, IOVA, len(content)))
        assert await reader.outcome() == content
        answering.cancel_scope.cancel()
    assert asked == (1 if content == bytes(10) else 3 + early)


async def test_who_has_which_ways_may_be_told_by_hand(tmp_path: Path, nursery: trio.Nursery) -> None:
    shifted = Overrides(force=frozenset({Quirk.SHIFTED_DMA}))
    by = partial(serve, session=partial(Session, quirks=shifted))
    async with world(tmp_path, by=by) as served:
        await work_as_qemu(served, await served.client(), nursery)


async def test_what_this_end_offers_may_be_told_by_hand(tmp_path: Path) -> None:
    by = partial(serve, session=partial(Session, offer=Limits(twin_socket=False, max_data_xfer_size=4096)))
    async with world(tmp_path, by=by) as served:
        client = await served.connect()
        reply = await client.negotiate({"max_msg_fds": 8, "twin_socket": {"supported": True}})
        assert not reply.fds
        assert b'"max_data_xfer_size":4096' in reply.payload
        await client.do(GET_INFO, INFO)
        assert served.function.dma.remote_limit == 4096


async def test_a_message_that_finds_no_room_in_the_last_moment_before_sleep_is_sent_all_the_same(
    tmp_path: Path, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over: list[Callable[[], object]] = []

    class Token:
        """The callbacks of threads run when the session lets others run, not before."""

        def run_sync_soon(self, call: Callable[..., object], *args: object) -> None:
            handed_over.append(partial(call, *args))

    checkpoint = trio.lowlevel.checkpoint

    async def others_run() -> None:
        await checkpoint()
        while handed_over:
            handed_over.pop()()

    monkeypatch.setattr(trio.lowlevel, "checkpoint", others_run)
    async with world(tmp_path, limits=SessionLimits(messages_per_turn=1)) as served:
        client = await served.client()
        remote = memory(served)
        assert isinstance(remote, InBandMemory)
        monkeypatch.setattr(remote, "_token", Token())
        worker = Worker(nursery, partial(remote.read, IOVA, 4))
        with trio.fail_after(20):
            while not handed_over:
                await trio.testing.wait_all_tasks_blocked()
        stuffed = stuff(remote)
        fd = os.eventfd(0)  # so that it is the session's to handle, not the drain's
        say(client, (message(REGION_WRITE, access(0, 0, 4) + b"abcd", flags=NO_REPLY), [fd]))
        os.close(fd)
        await trio.testing.wait_all_tasks_blocked()
        assert not handed_over
        while stuffed:
            stuffed -= len(await client.socket.recv(min(stuffed, 1 << 16)))
        with trio.fail_after(20):
            await client.send(granted(await said(client), b"abcd"))
        assert await worker.outcome() == b"abcd"


def stuff(remote: InBandMemory) -> int:
    """Leave no room in the session's socket; how many bytes the client has to take before its own."""
    with socket.socket(fileno=os.dup(remote._fd)) as same:
        stuffed = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                stuffed += same.send(bytes(1 << 12))
    return stuffed
