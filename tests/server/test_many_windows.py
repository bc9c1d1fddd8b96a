"""As many DMA windows as a guest's virtual IOMMU makes, and the wide unmaps with which it starts over."""

from __future__ import annotations

import errno
import json
import os
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from device.dma import DmaWindows
from protocol.limits import DEFAULT_MAX_DMA_MAPS, MAX_DMA_MAPS, Limits
from server import serve
from server.session import Session
from tests.client.test_end_to_end import serving
from tests.server.raw import DMA_MAP, DMA_UNMAP, RawClient, connect, dma, message, version
from tests.server.test_remote import QEMU
from tests.server.world import PAGE, World, world

AT_ONCE = 256
STRIDE = 2 * PAGE
EVERYWHERE = [(1 << bits, 1 << bits) for bits in range(30, 48)] + [
    (0x8000_0000_0000, 0x8000_0000_0000),
    (1 << 63, 1 << 63),
]
"""Where no window is: the aligned powers of two with which QEMU's intel-iommu covers an address space."""


def unmap(address: int, size: int) -> bytes:
    """The payload of a DMA_UNMAP."""
    return struct.pack("=IIQQ", 24, 0, address, size)


async def map_pages(client: RawClient, first: int, count: int, fd: int | None = None) -> list[int]:
    """Map windows of a page, many requests on the way at a time; the errors of those that were refused."""
    errors = []
    for start in range(first, first + count, AT_ONCE):
        numbers = range(start, min(start + AT_ONCE, first + count))
        asked = [
            message(DMA_MAP, dma(n * STRIDE, PAGE, offset=0 if fd is None else n * PAGE)) for n in numbers
        ]
        if fd is None:
            await client.send(b"".join(asked))
        else:
            for one in asked:
                await client.send(one, [fd])
        for _ in numbers:
            reply = await client.receive()
            assert reply is not None
            assert reply.command == DMA_MAP
            if reply.error:
                errors.append(reply.error)
    return errors


async def agree(client: RawClient, capabilities: dict[str, Any], minor: int = 1) -> int:
    """Agree on a version; how many windows the server says."""
    await client.send(version(capabilities, minor=minor))
    reply = await client.receive()
    assert reply is not None
    assert not reply.error
    told = json.loads(reply.payload[4:].rstrip(b"\0"))["capabilities"]["max_dma_maps"]
    assert isinstance(told, int)
    return told


async def agreed(served: World, windows: int) -> RawClient:
    """A client that said so many windows, and was told as many."""
    client = await served.connect()
    assert await agree(client, {"max_msg_fds": 8, "max_dma_maps": windows}) == windows
    return client


@pytest.mark.parametrize("address", [0, 0x8000_0000_0000])
async def test_a_span_of_no_window_is_unmapped_quietly_beside_65535_windows(
    served: World, address: int
) -> None:
    windows: DmaWindows = served.function.dma
    client = await agreed(served, DEFAULT_MAX_DMA_MAPS)
    assert await map_pages(client, 0, DEFAULT_MAX_DMA_MAPS) == []
    before = (windows.generation, windows.epoch, windows.moved)
    for span in EVERYWHERE:
        reply = await client.do(DMA_UNMAP, unmap(*span))
        assert reply.payload == unmap(*span)
    assert (windows.generation, windows.epoch, windows.moved) == before
    assert await client.refused(DMA_UNMAP, unmap(STRIDE, 99 * STRIDE + PAGE // 2)) == errno.EINVAL
    assert len(windows) == DEFAULT_MAX_DMA_MAPS
    await client.do(DMA_UNMAP, unmap(address, 0x8000_0000_0000))
    assert len(windows) == (DEFAULT_MAX_DMA_MAPS if address else 0)


async def test_a_client_that_asks_for_more_windows_gets_them(served: World) -> None:
    client = await agreed(served, MAX_DMA_MAPS)
    assert await map_pages(client, 0, MAX_DMA_MAPS + 1) == [errno.ENOSPC]
    assert len(served.function.dma) == MAX_DMA_MAPS
    await client.do(DMA_UNMAP, unmap(0, STRIDE))
    assert await map_pages(client, MAX_DMA_MAPS, 1) == []


async def test_nobody_is_told_more_windows_than_the_server_bears(served: World) -> None:
    client = await served.connect()
    assert await agree(client, {"max_msg_fds": 8, "max_dma_maps": MAX_DMA_MAPS + 1}) == MAX_DMA_MAPS


async def test_qemu_is_told_what_it_said_and_does_not_have_to_count(tmp_path: Path) -> None:
    few = partial(serve, session=partial(Session, offer=Limits(max_dma_maps=DEFAULT_MAX_DMA_MAPS + 2)))
    async with world(tmp_path, by=few) as served:
        client = await served.connect()
        assert await agree(client, QEMU, minor=0) == DEFAULT_MAX_DMA_MAPS
        assert await map_pages(client, 0, DEFAULT_MAX_DMA_MAPS + 3) == [errno.ENOSPC]


async def test_others_are_held_to_what_they_said(served: World) -> None:
    client = await agreed(served, DEFAULT_MAX_DMA_MAPS)
    assert await map_pages(client, 0, DEFAULT_MAX_DMA_MAPS + 1) == [errno.ENOSPC]


async def test_wide_unmaps_are_answered_by_a_served_card_with_65535_windows_of_one_file(
    tmp_path: Path,
) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, DEFAULT_MAX_DMA_MAPS * PAGE)
    async with serving(tmp_path) as (path, _):
        client = await connect(path)
        try:
            assert await agree(client, QEMU, minor=0) == DEFAULT_MAX_DMA_MAPS
            assert await map_pages(client, 0, DEFAULT_MAX_DMA_MAPS, fd) == []
            for span in EVERYWHERE:
                await client.do(DMA_UNMAP, unmap(*span))
            assert await map_pages(client, 7, 1, fd) == [errno.EEXIST]
            await client.do(DMA_UNMAP, unmap(0, 0x8000_0000_0000))
            assert await map_pages(client, 7, 1, fd) == []
        finally:
            client.close()
            os.close(fd)
