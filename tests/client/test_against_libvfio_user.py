"""The client against the real libvfio-user: a server that shares nothing with this project."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import client
from bench._servers import Server, libvfio_user_command
from client.pci import read_config
from protocol.vfio import RegionFlags, RegionIndex
from tests.conftest import cannot
from tests.peers.cache import PeerError

PATIENCE = 20


@pytest.fixture(scope="module")
def command() -> str:
    """How to start the server; building it needs Debian's archive once."""
    try:
        return libvfio_user_command()
    except PeerError as error:
        cannot(f"libvfio-user cannot be had here: {error}")


@asynccontextmanager
async def session_with(command: str, path: Path) -> AsyncIterator[client.Session]:
    server = Server(command, path)
    try:
        with trio.fail_after(PATIENCE):
            await trio.to_thread.run_sync(server.wait_until_listening)
            async with client.connect(path) as session:
                yield session
    finally:
        server.stop()


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
