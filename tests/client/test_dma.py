from __future__ import annotations

import json
import mmap
import os
import struct
from errno import EBUSY, EEXIST

import pytest
import trio
import trio.testing

import client
from client.dma import mapped_in
from protocol import LocalProtocolError
from protocol.limits import MAX_DMA_PAGE
from protocol.messages import DmaUnmap
from protocol.vfio import DmaUnmapFlags
from tests.client.peer import DMA_MAP, DMA_UNMAP, Peer, session_with
from tests.descriptors import open_fds, settled_fds


async def one_window(peer: Peer) -> tuple[int, int, int]:
    """Accept a window; (iova, size, descriptor)."""
    message = await peer.expect(DMA_MAP)
    argsz, flags, offset, iova, size = struct.unpack("=IIQQQ", message.payload)
    assert (argsz, flags, offset) == (32, 3, 0)
    peer.reply(message)
    (fd,) = message.fds
    return iova, size, fd


async def no_window(peer: Peer, iova: int, size: int) -> None:
    """Take a window back."""
    message = await peer.expect(DMA_UNMAP)
    assert message.payload == struct.pack("=IIQQ", 24, 0, iova, size)
    peer.reply(message, message.payload)


async def test_both_sides_see_the_same_bytes() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            iova, size, fd = await one_window(peer)
            assert size == 8192
            with mmap.mmap(fd, size) as device:
                device[100:105] = b"hello"
            os.close(fd)
            await no_window(peer, iova, size)

        nursery.start_soon(serve)
        async with client.dma_memory(session, 5000) as memory:
            assert bytes(memory.view[100:105]) == b"hello"
            assert memory.size == 8192


async def test_the_size_of_the_memory_is_sealed() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            iova, size, fd = await one_window(peer)
            with pytest.raises(PermissionError):
                os.truncate(fd, 0)
            os.close(fd)
            await no_window(peer, iova, size)

        nursery.start_soon(serve)
        async with client.dma_memory(session, 4096):
            pass


async def test_pieces_are_aligned_zeroed_and_do_not_overlap() -> None:
    memory = client.DmaMemory(8192, 0x10000)
    first = memory.allocate(10)
    second = memory.allocate(100, align=256)
    assert (first.iova, second.iova) == (0x10000, 0x10100)
    assert len(second.view) == 100
    second.view[:] = b"x" * 100
    assert bytes(memory.view[0x100:0x164]) == b"x" * 100
    with pytest.raises(client.ClientError, match="left"):
        memory.allocate(8192)
    memory.clear()
    assert memory.allocate(8192).iova == 0x10000
    assert not any(memory.view)
    memory.close()


async def test_the_window_is_taken_back_when_the_block_fails_or_is_cancelled() -> None:
    before = settled_fds()
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            for _ in range(2):
                iova, size, fd = await one_window(peer)
                os.close(fd)
                assert iova == 0x5000
                await no_window(peer, iova, size)

        nursery.start_soon(serve)
        with pytest.raises(KeyError):
            async with client.dma_memory(session, 4096, iova=0x5000):
                raise KeyError
        with trio.move_on_after(0.01):
            async with client.dma_memory(session, 4096, iova=0x5000):
                await trio.sleep_forever()
    assert open_fds() == before


async def test_a_refused_window_gives_its_address_back() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(DMA_MAP)
            os.close(message.fds[0])
            peer.refuse(message, EEXIST)

        nursery.start_soon(serve)
        with pytest.raises(client.ServerError, match="EEXIST"):
            await client.dma_memory(session, 4096, iova=0x5000).__aenter__()
        assert session.iovas.take(4096, at=0x5000) == 0x5000


async def test_a_window_whose_unmapping_must_not_be_sent_stays() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:
        nursery.start_soon(session.dma_map, 0x1000, 4096)
        peer.reply(await peer.expect(DMA_MAP))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(LocalProtocolError, match="DMA_UNMAP"):
            await session.unmap(DmaUnmap(DmaUnmap.size, DmaUnmapFlags.GET_DIRTY_BITMAP, 0x1000, 4096))
        assert (0x1000, 4096) in session.windows


async def test_a_window_whose_mapping_is_cancelled_is_taken_back() -> None:
    scope = trio.CancelScope()
    with trio.fail_after(5):
        async with session_with() as (session, peer), trio.open_nursery() as nursery:

            async def serve() -> None:
                message = await peer.expect(DMA_MAP)
                os.close(message.fds[0])
                scope.cancel()
                await no_window(peer, 0x5000, 4096)

            nursery.start_soon(serve)
            with scope:
                async with client.dma_memory(session, 4096, iova=0x5000):
                    raise AssertionError("the server has not answered")
            assert scope.cancelled_caught
            assert session.iovas.take(4096, at=0x5000) == 0x5000


async def test_the_address_of_a_window_that_the_server_keeps_stays_taken() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            _, _, fd = await one_window(peer)
            os.close(fd)
            peer.refuse(await peer.expect(DMA_UNMAP), EBUSY)

        nursery.start_soon(serve)
        async with client.dma_memory(session, 4096, iova=0x5000):
            pass
        with pytest.raises(client.ClientError, match="in use"):
            session.iovas.take(4096, at=0x5000)


async def test_two_windows_get_different_addresses() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            windows = []
            for _ in range(2):
                iova, size, fd = await one_window(peer)
                os.close(fd)
                windows.append((iova, size))
            for window in reversed(windows):
                await no_window(peer, *window)

        nursery.start_soon(serve)
        async with client.dma_memory(session, 4096) as first, client.dma_memory(session, 4096) as second:
            assert first.iova + first.size <= second.iova


async def test_memory_that_is_not_shared_goes_without_a_descriptor() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            message = await peer.expect(DMA_MAP)
            assert message.fds == ()
            assert struct.unpack("=IIQQQ", message.payload) == (32, 3, 0, 0x5000, 4096)
            peer.reply(message)
            await no_window(peer, 0x5000, 4096)

        nursery.start_soon(serve)
        async with client.dma_memory(session, 100, iova=0x5000, shared=False) as memory:
            assert memory.fd is None
            memory.allocate(10).view[:] = b"0123456789"


def saying(**capabilities: int) -> bytes:
    """VERSION's JSON."""
    return json.dumps({"capabilities": {"max_msg_fds": 8, **capabilities}}).encode() + b"\0"


async def test_no_more_windows_are_mapped_than_the_server_takes() -> None:
    async with session_with(capabilities=saying(max_dma_maps=2)) as (session, peer):

        async def serve(*commands: int) -> None:
            for command in commands:
                message = await peer.expect(command)
                peer.reply(message, message.payload if command == DMA_UNMAP else b"")

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, DMA_MAP, DMA_MAP, DMA_UNMAP, DMA_MAP)
                await session.dma_map(0x1000, 4096)
                await session.dma_map(0x2000, 4096)
                with pytest.raises(client.ClientError, match="takes 2 DMA windows"):
                    await session.dma_map(0x3000, 4096)
                with pytest.raises(client.ClientError, match="takes 2 DMA windows"):
                    await client.dma_memory(session, 4096, iova=0x5000).__aenter__()
                assert session.iovas.take(4096, at=0x5000) == 0x5000
                await session.dma_unmap(0x1000, 4096)
                await session.dma_map(0x3000, 4096)


async def test_windows_are_made_of_the_servers_pages() -> None:
    async with session_with(capabilities=saying(pgsizes=(1 << 16) | (1 << 21))) as (session, peer):
        async with trio.open_nursery() as nursery:

            async def serve() -> None:
                iova, size, fd = await one_window(peer)
                os.close(fd)
                assert (iova % 0x10000, size) == (0, 0x10000)
                await no_window(peer, iova, size)

            nursery.start_soon(serve)
            async with client.dma_memory(session, 5000) as memory:
                assert memory.size == 0x10000
        for iova, size in ((0x11000, 0x10000), (0x10000, 0x11000)):
            with pytest.raises(client.ClientError, match="pages are of 0x10000 bytes"):
                await session.dma_map(iova, size)
        with pytest.raises(client.ClientError, match="pages are of 0x10000 bytes"):
            await client.dma_memory(session, 4096, iova=0x11000).__aenter__()
        assert list(session.windows) == []
        assert session.iovas.take(4096, at=0x11000) == 0x11000


@pytest.mark.parametrize(
    ("pages", "what"), [(0, "no page size"), (MAX_DMA_PAGE << 1, "smallest page"), (MAX_DMA_PAGE, None)]
)
async def test_page_sizes_that_nobody_has_are_refused(pages: int, what: str | None) -> None:
    async with session_with(capabilities=saying(pgsizes=pages)) as (session, peer):
        if what is None:
            async with trio.open_nursery() as nursery:

                async def serve() -> None:
                    iova, size, fd = await one_window(peer)
                    os.close(fd)
                    await no_window(peer, iova, size)

                nursery.start_soon(serve)
                async with client.dma_memory(session, 1) as memory:
                    assert memory.size == MAX_DMA_PAGE
        else:
            with pytest.raises(client.ClientError, match=what):
                await client.dma_memory(session, 1).__aenter__()


async def test_memory_of_one_session_can_be_mapped_in_another() -> None:
    async with (
        session_with() as (first, one),
        session_with() as (second, other),
        trio.open_nursery() as nursery,
    ):

        async def serve(peer: Peer, content: bytes) -> None:
            iova, size, fd = await one_window(peer)
            with mmap.mmap(fd, size) as device:
                assert device[:5] == content
            os.close(fd)
            await no_window(peer, iova, size)

        nursery.start_soon(serve, one, bytes(5))
        async with client.dma_memory(first, 4096, iova=0x5000) as memory:
            memory.view[:5] = b"hello"
            nursery.start_soon(serve, other, b"hello")
            async with mapped_in(second, memory):
                assert [window.iova for window in second.windows] == [0x5000]
                with pytest.raises(client.ClientError, match="in use"):
                    await mapped_in(second, memory).__aenter__()
            assert list(second.windows) == []
