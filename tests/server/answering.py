"""The client's part in DMA messages, by hand, and threads that ask for them."""

import errno
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import trio
import trio.testing

from device.dma.remote import RemoteMemory, Wanted, always
from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from server._remote import ByMessage
from tests.server.raw import (
    DMA_READ,
    ERROR,
    REPLY,
    Message,
    RawClient,
    message,
)
from tests.server.world import PAGE, World

INFO = struct.pack("=IIII", 16, 0, 0, 0)
IOVA = 0x1000


def memory(served: World) -> RemoteMemory:
    """What the device reaches the client's memory with."""
    remote = served.function.dma.remote
    assert remote is not None
    return remote


class Worker:
    """A thread of the device that does one thing; `result` is what came of it."""

    def __init__(self, nursery: trio.Nursery, call: Callable[[], Any]) -> None:
        self.result: Any = None
        self.over = trio.Event()
        nursery.start_soon(self._run, call)

    async def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.result = await trio.to_thread.run_sync(call)
        except DeviceError as error:
            self.result = error.errno
        self.over.set()

    async def outcome(self) -> Any:
        """What it returned, or the errno."""
        with trio.fail_after(20):
            await self.over.wait()
        return self.result


async def give_up(served: World, nursery: trio.Nursery, call: Callable[[], object]) -> None:
    """Have a worker ask the client by ``call``, and give up before there is an answer; who asks later waits
    as long as before.
    """
    remote = memory(served)
    assert isinstance(remote, ByMessage)
    before, patience = remote._engine.outstanding, remote._deadline
    while remote._engine.outstanding == before:  # he may have given up before his request went out
        remote._deadline = 0.01
        assert await Worker(nursery, call).outcome() == errno.ETIMEDOUT
    remote._deadline = patience


async def said(client: RawClient) -> Message:
    got = await client.receive()
    assert got is not None, "the server hung up"
    return got


def granted(request: Message, data: bytes = b"") -> bytes:
    """The reply to a DMA request."""
    return message(request.command, request.payload[:16] + data, message_id=request.message_id, flags=REPLY)


def refused(request: Message, number: int) -> bytes:
    return struct.pack("=HHIII", request.message_id, request.command, 16, REPLY | ERROR, number)


def say(client: RawClient, *pieces: tuple[bytes, list[int]]) -> None:
    """Send pieces with their descriptors before the server, in this very thread, sees the first."""
    with socket.socket(fileno=os.dup(client.socket.fileno())) as same:
        for data, fds in pieces:
            assert socket.send_fds(same, [data], fds) == len(data)


def reply_to(number: int, iova: int, data: bytes) -> bytes:
    """The answer to the server's read, which has the ``number`` that its requests are counted by."""
    return message(DMA_READ, struct.pack("=QQ", iova, len(data)) + data, message_id=number, flags=REPLY)


class Overtaken:
    """A road to the client's memory on which something else comes first."""

    def __init__(self, road: RemoteMemory) -> None:
        self._road = road
        self.asked = threading.Event()
        self.overtaken = threading.Event()

    def read(self, iova: int, length: int, wanted: Wanted = always) -> bytes:
        """See RemoteMemory."""
        self._wait()
        return self._road.read(iova, length, wanted)

    def write(self, iova: int, data: bytes, wanted: Wanted = always) -> None:
        """See RemoteMemory."""
        self._wait()
        self._road.write(iova, data, wanted)

    def _wait(self) -> None:
        self.asked.set()
        assert self.overtaken.wait(20)


async def overtake(served: World, by: Callable[[PciFunction], object], call: Callable[[], object]) -> Any:
    """What comes of a worker's ``call``, which ``by`` overtakes between the device and the client."""
    function = served.function
    road = Overtaken(memory(served))
    function.dma.remote = road

    def work() -> Any:
        with function.gate:
            return call()

    async with trio.open_nursery() as nursery:
        worker = Worker(nursery, work)
        await trio.to_thread.run_sync(road.asked.wait)
        by(function)
        road.overtaken.set()
        return await worker.outcome()


def unmap(function: PciFunction) -> None:
    with function.gate:
        function.dma.unmap(IOVA, PAGE)


OVERTAKERS: list[Callable[[PciFunction], object]] = [
    lambda function: function.reset(ResetKind.DEVICE),
    lambda function: function.reset(ResetKind.FLR),
    lambda function: function.stop(),
    unmap,
]
