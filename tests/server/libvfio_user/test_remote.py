"""The client's memory by the library's messages, with a client in a thread of its own."""

import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from device.errors import DeviceError
from server import SessionLimits
from server.libvfio_user import Library, Limit, serve
from tests.server.raw import DMA_MAP, DMA_READ, REPLY, access, dma, message, version
from tests.server.world import World, world

pytestmark = pytest.mark.needs_no(Limit.MESSAGE_DMA)

TWIN = {"max_msg_fds": 8, "max_data_xfer_size": 4096, "twin_socket": {"supported": True}}
MAPPED = 1 << 16
PATIENCE_S = 10


class Client:
    """A client with memory that it shares with nobody; `talk` in a thread."""

    def __init__(self, path: Path, capabilities: object = TWIN) -> None:
        self.memory = bytearray(range(256)) * (MAPPED // 256)
        self.main = socket.socket(socket.AF_UNIX)
        self.main.settimeout(PATIENCE_S)
        self.main.connect(os.fspath(path))
        self.main.sendall(version(capabilities))
        head, fds, _, _ = socket.recv_fds(self.main, 16, 4)
        agreed = json.loads(self._rest(self.main, head)[4:-1])["capabilities"]
        assert agreed.get("twin_socket", {}).get("supported", False) == bool(fds)
        self.twin = socket.socket(fileno=fds[0]) if fds else None
        self.main.sendall(message(DMA_MAP, dma(0, MAPPED)))
        self._rest(self.main, self.main.recv(16))

    def _rest(self, link: socket.socket, head: bytes) -> bytes:
        size = struct.unpack_from("=I", head, 4)[0] - 16
        return link.recv(size, socket.MSG_WAITALL) if size else b""

    def answer(self, times: int) -> list[int]:
        """Answer so many DMA messages; their sizes."""
        assert self.twin is not None
        sizes = []
        for _ in range(times):
            head = self.twin.recv(16, socket.MSG_WAITALL)
            message_id, command = struct.unpack_from("=HH", head)
            body = self._rest(self.twin, head)
            address, count = struct.unpack_from("=QQ", body)
            sizes.append(count)
            data = b""
            if command == DMA_READ:
                data = bytes(self.memory[address : address + count])
            else:
                self.memory[address : address + count] = body[16:]
            self.twin.sendall(message(command, body[:16] + data, message_id=message_id, flags=REPLY))
        return sizes

    def read_config(self) -> bytes:
        self.main.sendall(message(9, access(0, 7, 4)))
        return self._rest(self.main, self.main.recv(16))[16:]

    def close(self) -> None:
        self.main.close()
        if self.twin is not None:
            self.twin.close()


@contextmanager
def closing(client: Client) -> Iterator[Client]:
    try:
        yield client
    finally:
        client.close()


async def connected(served: World, capabilities: object = TWIN) -> Client:
    return await trio.to_thread.run_sync(Client, served.path, capabilities)


async def test_a_worker_reads_and_writes_what_has_no_descriptor(served: World) -> None:
    with closing(await connected(served)) as client:
        answering = threading.Thread(target=client.answer, args=(2,))
        answering.start()
        reach = served.function.dma
        assert await trio.to_thread.run_sync(reach.read, 16, 4) == bytes([16, 17, 18, 19])
        await trio.to_thread.run_sync(reach.write, 0x123, b"there")
        await trio.to_thread.run_sync(answering.join)
        assert client.memory[0x123:0x128] == b"there"
        assert len(await trio.to_thread.run_sync(client.read_config)) == 4


async def test_the_clients_largest_transfer_is_kept_to(served: World) -> None:
    with closing(await connected(served)) as client:
        sizes: list[int] = []
        answering = threading.Thread(target=lambda: sizes.extend(client.answer(3)))
        answering.start()
        data = await trio.to_thread.run_sync(served.function.dma.read, 0, 10000)
        await trio.to_thread.run_sync(answering.join)
        assert data == bytes(client.memory[:10000])
        assert sizes == [4096, 4096, 1808]


async def test_a_client_that_does_not_answer_loses_its_session(tmp_path: Path, library: Library) -> None:
    by = partial(serve, library=library)
    async with world(tmp_path, by=by, limits=SessionLimits(dma_deadline=0.1)) as served:
        with closing(await connected(served)) as client:
            with pytest.raises(DeviceError) as caught:
                await trio.to_thread.run_sync(served.function.dma.read, 0, 4)
            assert caught.value.errno == errno.ECANCELED  # the card was reset meanwhile
            assert await trio.to_thread.run_sync(client.main.recv, 1) == b""
        with closing(await connected(served)) as client:
            assert len(await trio.to_thread.run_sync(client.read_config)) == 4


@pytest.mark.shows(Limit.IN_BAND_DMA)
async def test_without_a_twin_socket_it_is_out_of_reach(served: World) -> None:
    with closing(await connected(served, {"max_msg_fds": 8})):
        with pytest.raises(DeviceError) as caught:
            await trio.to_thread.run_sync(served.function.dma.read, 0, 4)
        assert caught.value.errno == errno.EFAULT
