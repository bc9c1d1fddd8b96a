"""A scripted server that exports a BAR, and importers of all kinds."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio

import client
from client.dmabuf import Attachment, BarExport, DmaBufError, exported_bar
from tests.client.peer import FEATURE, REGION_WRITE, RESET, FakeRegion, Message, Peer, session_with
from tests.descriptors import open_fds, settled_fds

PAGE = 4096
BAR = 4
SIZE = 4 * PAGE
START = 2 * PAGE
"""Where the BAR begins in its file."""
GET_DMA_BUF = 1 << 16 | 11
REGIONS = {BAR: FakeRegion(SIZE, offset=START)}
MEMORY_ON, MEMORY_OFF = b"\x02\0", b"\0\0"


class Slow:
    """An importer that lets go when its test says so."""

    def __init__(self) -> None:
        self.told = 0
        self.back = 0
        self.lets_go = trio.Event()
        self.attachment: Attachment | None = None

    async def invalidate(self) -> None:
        self.told += 1
        await self.lets_go.wait()
        while self.attachment is not None and self.attachment.maps:
            self.attachment.unmap()

    async def moved(self) -> None:
        self.back += 1


class Stubborn:
    """An importer that hears what is said and does nothing."""

    def __init__(self) -> None:
        self.told = 0

    async def invalidate(self) -> None:
        self.told += 1


class Failing:
    """An importer that cannot let go, as often as it is told here."""

    def __init__(self, times: int = 1) -> None:
        self.told = 0
        self.times = times

    async def invalidate(self) -> None:
        self.told += 1
        if self.told <= self.times:
            raise RuntimeError("a mistake in the importer's code")


def quick() -> Slow:
    """One that lets go at once."""
    made = Slow()
    made.lets_go.set()
    return made


def attached(export: BarExport, importer: Slow, *, maps: int = 1) -> Attachment:
    """Its attachment, mapped."""
    importer.attachment = export.attach(importer)
    for _ in range(maps):
        importer.attachment.map()
    return importer.attachment


class FakeExporter:
    """A server that exports `fds` with every answer, whose data is `data`, or what was asked for."""

    def __init__(self, fds: Sequence[int], data: bytes | None = None, *, cut: int = 0) -> None:
        self.fds, self.data, self.cut = tuple(fds), data, cut
        self.written: list[bytes] = []
        self.asked: list[bytes] = []
        self.watch: BarExport | None = None
        self.maps_seen: list[int] = []
        self.silent = False

    async def serve(self, peer: Peer) -> None:
        try:
            while True:
                self.answer(peer, await peer.next())
        except (EOFError, ConnectionResetError):
            return

    def answer(self, peer: Peer, message: Message) -> None:
        if self.watch is not None:
            self.maps_seen.append(self.watch.maps)
        if message.command == FEATURE:
            self.asked.append(message.payload)
            _, flags = struct.unpack_from("=II", message.payload)
            assert flags == GET_DMA_BUF
            payload = message.payload[:8] + (message.payload[8:] if self.data is None else self.data)
            peer.reply(message, payload[: len(payload) - self.cut], self.fds)
        elif message.command == RESET:
            peer.reply(message)
        else:
            assert message.command == REGION_WRITE
            self.written.append(message.payload[16:])
            if not self.silent:
                peer.reply(message, message.payload[:16])


@contextmanager
def file(size: int = START + SIZE) -> Iterator[int]:
    """A BAR's file."""
    fd = os.memfd_create("bar", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


@asynccontextmanager
async def session_of(
    server: FakeExporter, regions: dict[int, FakeRegion] | None = None
) -> AsyncIterator[client.Session]:
    """A session with this server."""
    capabilities = b'{"capabilities":{"max_msg_fds":8}}\0'
    made = session_with(regions=REGIONS if regions is None else regions, capabilities=capabilities)
    async with made as (session, peer), trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, peer)
        yield session
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def a_session() -> AsyncIterator[tuple[client.Session, FakeExporter]]:
    """A session with a server that exports a file of the right size; no descriptor is left."""
    before = settled_fds()
    with file() as fd:
        server = FakeExporter([fd])
        async with session_of(server) as session:
            yield session, server
    assert open_fds() == before


@asynccontextmanager
async def an_export() -> AsyncIterator[tuple[BarExport, client.Session, FakeExporter]]:
    """The export of all of a BAR."""
    async with a_session() as (session, server), exported_bar(session, BAR) as export:
        server.watch = export
        yield export, session, server


async def switch_memory(session: client.Session, command: bytes) -> None:
    await session.region_write(7, 4, command)


def refused(call: object, number: int) -> None:
    """The call is refused with this errno."""
    assert callable(call)
    with pytest.raises(DmaBufError) as refusal:
        call()
    assert refusal.value.errno == number
