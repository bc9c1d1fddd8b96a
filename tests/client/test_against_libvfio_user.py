"""The client against the real libvfio-user: a server that shares nothing with this project."""

from __future__ import annotations

import os
import struct
from errno import EFAULT, ENOENT
from pathlib import Path

import pytest
import trio

import client
from bench._servers import Server, libvfio_user_command
from client.pci import read_config
from protocol.quirks import Overrides, Quirk
from protocol.vfio import DmaMapFlags, Feature, RegionFlags, RegionIndex
from tests.client.lvu_device import lvu_device, session_with
from tests.conftest import cannot
from tests.peers.cache import PeerError


@pytest.fixture(scope="module")
def command() -> str:
    """How to start the server; building it needs Debian's archive once."""
    try:
        return libvfio_user_command()
    except PeerError as error:
        cannot(f"libvfio-user cannot be had here: {error}")


@pytest.fixture(scope="module")
def dma_command() -> str:
    """How to start the device that reaches memory by message."""
    return lvu_device()


async def test_it_is_agreed_with_and_described(command: str, tmp_path: Path) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        assert session.connection.peer.max_msg_fds == 8
        bar0 = session.regions[RegionIndex.BAR0]
        assert (bar0.size, bar0.flags) == (4096, RegionFlags.READ | RegionFlags.WRITE)
        config = await read_config(session)
        assert (config.vendor, config.device) == (0x1AF4, 0x10F0)


async def test_registers_are_read_and_written(command: str, tmp_path: Path) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        await session.region_write(RegionIndex.BAR0, 0x10, b"abcd")
        assert await session.region_read(RegionIndex.BAR0, 0x10, 4) == b"abcd"
        for number in range(100):
            await session.post_write(RegionIndex.BAR0, 0x20, number.to_bytes(4, "little"))
        assert await session.region_read(RegionIndex.BAR0, 0x20, 4) == (99).to_bytes(4, "little")


async def test_reads_are_pipelined(command: str, tmp_path: Path) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        for offset in range(0, 256, 4):
            await session.region_write(RegionIndex.BAR0, offset, offset.to_bytes(4, "little"))
        seen: dict[int, bytes] = {}

        async def read(offset: int) -> None:
            seen[offset] = await session.region_read(RegionIndex.BAR0, offset, 4)

        async with trio.open_nursery() as nursery:
            for offset in range(0, 256, 4):
                nursery.start_soon(read, offset)
        assert seen == {offset: offset.to_bytes(4, "little") for offset in range(0, 256, 4)}


async def test_its_refusals_carry_a_payload_and_the_session_goes_on(command: str, tmp_path: Path) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        for _ in range(3):
            with pytest.raises(client.ServerError, match=r"REGION_READ.*EINVAL"):
                await session.region_read(RegionIndex.BAR0, 1, 2)
        assert len(await session.region_read(RegionIndex.BAR0, 0, 4)) == 4


async def test_it_takes_and_gives_back_a_window(command: str, tmp_path: Path) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        for _ in range(3):
            async with client.dma_memory(session, 1 << 20) as memory:
                assert memory.size == 1 << 20


async def test_it_can_be_reset(command: str, tmp_path: Path) -> None:
    async with session_with(command, tmp_path / "lvu.sock") as session:
        await session.reset()
        assert len(await session.region_read(RegionIndex.CONFIG, 0, 64)) == 64


BUFFER = 0x1000
"""Where the DMA server's BAR0 has what it read, or writes."""


async def dma(session: client.Session, address: int, length: int, command: int) -> int:
    """Let the server read (1) or write (2) client memory by message; its errno."""
    await session.region_write(RegionIndex.BAR0, 0, struct.pack("=QI", address, length))
    await session.region_write(RegionIndex.BAR0, 12, struct.pack("=I", command))
    return int.from_bytes(await session.region_read(RegionIndex.BAR0, 16, 4), "little")


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by message alone"])
@pytest.mark.parametrize("size", [1, 4096, 1 << 20])
async def test_it_reads_and_writes_our_memory_by_message(
    dma_command: str, tmp_path: Path, shared: bool, size: int
) -> None:
    async with (
        session_with(dma_command, tmp_path / "lvu.sock") as session,
        client.dma_memory(session, 2 << 20, shared=shared) as memory,
    ):
        content = os.urandom(size)
        memory.view[:size] = content
        assert await dma(session, memory.iova, size, 1) == 0
        assert await session.region_read(RegionIndex.BAR0, BUFFER, size) == content
        written = os.urandom(size)
        await session.region_write(RegionIndex.BAR0, BUFFER, written)
        assert await dma(session, memory.iova, size, 2) == 0
        assert bytes(memory.view[:size]) == written
        assert not any(memory.view[size:])


async def test_it_asks_for_the_beginning_of_a_window_only(dma_command: str, tmp_path: Path) -> None:
    async with session_with(dma_command, tmp_path / "lvu.sock") as session:
        assert Quirk.BASE_ONLY_DMA in session.connection.quirks
        async with client.dma_memory(session, 4096, shared=False) as memory:
            memory.view[:8] = b"base1234"
            assert await dma(session, memory.iova + 4, 4, 1) == 0
            assert await session.region_read(RegionIndex.BAR0, BUFFER, 4) == b"base"


async def test_our_refusals_reach_its_device(dma_command: str, tmp_path: Path) -> None:
    async with session_with(dma_command, tmp_path / "lvu.sock") as session:
        flags = DmaMapFlags.READ | DmaMapFlags.WRITE
        assert await dma(session, 0x5000, 4, 1) == ENOENT, "the library itself has no such window"
        await session.dma_map(0x5000, 4096, flags)  # no memory of ours behind it
        assert await dma(session, 0x5000, 4, 1) == EFAULT
        assert await dma(session, 0x5000, 4, 2) == EFAULT
        await session.dma_unmap(0x5000, 4096)


async def test_long_writes_reach_it_in_pieces_that_it_reads_whole(dma_command: str, tmp_path: Path) -> None:
    path = tmp_path / "lvu.sock"
    async with session_with(dma_command, path) as session:
        assert session.max_write < 1 << 15 < session.max_read
        data = os.urandom(session.max_write)
        for _ in range(200):
            await session.post_write(RegionIndex.BAR0, BUFFER, data)
        assert await session.region_read(RegionIndex.BAR0, BUFFER, len(data)) == data
    server = Server(dma_command, path)
    try:
        await trio.to_thread.run_sync(server.wait_until_listening)
        async with client.connect(path, quirks=Overrides(never=frozenset({Quirk.WHOLE_BODIES}))) as session:
            assert session.max_write == session.max_read
    finally:
        server.stop()


async def test_its_doorbells_are_eventfds(dma_command: str, tmp_path: Path) -> None:
    async with session_with(dma_command, tmp_path / "lvu.sock") as session:
        with await session.io_fds(RegionIndex.BAR0) as io_fds:
            fd = io_fds.find(0x20, 4, 7)
            assert fd is not None
            assert io_fds.find(0x24, 4, 7) is None
            os.eventfd_write(fd, 1)
        with pytest.raises(client.ServerError, match="EINVAL"):
            await session.io_fds(RegionIndex.CONFIG)


async def test_it_cannot_be_moved(dma_command: str, tmp_path: Path) -> None:
    async with session_with(dma_command, tmp_path / "lvu.sock") as session:
        assert not await session.feature_probe(Feature.MIGRATION)
        assert not await session.feature_probe(Feature.DMA_LOGGING_START)
