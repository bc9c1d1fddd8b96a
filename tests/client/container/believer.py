"""A scripted server that keeps what it was given to map, and can be told to refuse or to wait."""

from __future__ import annotations

import json
import os
import struct
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from errno import EEXIST, EIO, ENOENT

import pytest
import trio
import trio.testing

import client
from client.container import BarRange, Container, ContainerError, Mode, open_container
from client.mapping import BarMapping
from protocol.vfio import RegionIndex
from tests.client.peer import (
    CAPABILITIES,
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    FEATURE,
    REGION_WRITE,
    REPLY,
    FakeRegion,
    Message,
    Peer,
    session_with,
)

BAR_SIZE = 0x8000
BAR_OFFSET = 0x1000
COMMAND, MEMORY = 4, b"\x02\x00"
WITHOUT_MEMORY = b"\x00\x00"


@dataclass(frozen=True)
class Believed:
    """A window as the server has it; `file` is the inode it was given, None for a window by message."""

    size: int
    flags: int
    offset: int
    file: int | None


@dataclass
class Believer:
    """Windows by their address; `told` are the commands in their order."""

    peer: Peer
    windows: dict[int, Believed] = field(default_factory=dict)
    told: list[tuple[int, ...]] = field(default_factory=list)
    refuse: dict[int, int] = field(default_factory=dict)
    """Errno that a command is refused with, by command."""
    refuse_files: int = 0
    """Errno that a window is refused with that comes with a descriptor."""
    refuse_messages: int = 0
    """Errno that one is refused with that comes without."""
    refuse_window: tuple[int, int] | None = None
    """The address and flags of a window that is refused with EIO."""
    nonsense: set[int] = field(default_factory=set)
    """Commands that are not done, and answered with bytes that nobody asked for."""
    gate: trio.Event | None = None
    """Nothing is handled or answered until it is set."""
    bar: int = -1
    """The descriptor of an exported BAR."""
    _answers: deque[bytes] = field(default_factory=deque)

    async def serve(self) -> None:
        """Answer until the connection ends."""
        while True:
            try:
                message = await self.peer.next()
            except (EOFError, OSError):
                return
            if self.gate is not None:
                await self.gate.wait()
            if message.flags & REPLY:
                self._answers.append(message.payload)
                continue
            try:
                errno, payload, fds = self._handle(message)
            finally:
                for fd in message.fds:
                    os.close(fd)
            if errno:
                self.peer.refuse(message, errno)
            else:
                self.peer.reply(message, payload, fds)

    def _handle(self, message: Message) -> tuple[int, bytes, tuple[int, ...]]:
        if message.command in self.nonsense:
            return 0, b"nonsense" * 9, ()
        if message.command == DMA_MAP:
            return self._map(message), b"", ()
        if message.command == DMA_UNMAP:
            _, _, iova, size = struct.unpack("=IIQQ", message.payload)
            self.told.append((DMA_UNMAP, iova, size))
            if errno := self.refuse.get(DMA_UNMAP, 0):
                return errno, b"", ()
            if iova not in self.windows or self.windows[iova].size != size:
                return ENOENT, b"", ()
            del self.windows[iova]
            return 0, message.payload, ()
        if message.command == FEATURE:
            return 0, message.payload, (self.bar,)
        self.told.append((message.command,))
        if errno := self.refuse.get(message.command, 0):
            return errno, b"", ()
        return 0, message.payload[:16] if message.command == REGION_WRITE else b"", ()

    def _map(self, message: Message) -> int:
        _, flags, offset, iova, size = struct.unpack("=IIQQQ", message.payload)
        self.told.append((DMA_MAP, iova, size, flags))
        if errno := self.refuse.get(DMA_MAP, self.refuse_files if message.fds else self.refuse_messages):
            return errno
        if (iova, flags) == self.refuse_window:
            return EIO
        if any(iova < at + one.size and at < iova + size for at, one in self.windows.items()):
            return EEXIST
        file = os.fstat(message.fds[0]).st_ino if message.fds else None
        self.windows[iova] = Believed(size, flags, offset, file)
        return 0

    async def reads(self, iova: int, size: int) -> bytes:
        """What the client's memory has, by message."""
        self.peer.ask(DMA_READ, struct.pack("=QQ", iova, size))
        await trio.testing.wait_all_tasks_blocked()
        return self._answers.popleft()[16:]


@asynccontextmanager
async def believing(
    *, capabilities: bytes = CAPABILITIES, regions: Mapping[int, FakeRegion] | None = None, bar: int = -1
) -> AsyncIterator[tuple[client.Session, Believer]]:
    """A session with a server that believes what it is told."""
    async with session_with(capabilities=capabilities, regions=regions) as (session, peer):
        believer = Believer(peer, bar=bar)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(believer.serve)
            try:
                yield session, believer
            finally:
                nursery.cancel_scope.cancel()


@asynccontextmanager
async def with_bar(
    kind: type[BarMapping] = BarMapping, *, flags: int = 7, size: int = BAR_SIZE
) -> AsyncIterator[tuple[client.Session, Believer, BarMapping]]:
    """The same with memory in BAR 2, which begins with the second page of its file, and a mapping of it that
    follows the session.
    """
    fd = os.memfd_create("bar")
    os.ftruncate(fd, BAR_OFFSET + size)
    region = FakeRegion(size, flags, fds=(fd,), offset=BAR_OFFSET)
    try:
        async with believing(regions={RegionIndex.BAR2: region}, bar=fd) as (session, believer):
            with kind(session.regions[RegionIndex.BAR2], session.decoding) as mapping:
                yield session, believer, mapping
    finally:
        os.close(fd)


@asynccontextmanager
async def beside_a_bar(
    mode: Mode = Mode.TYPE1V2, kind: type[BarMapping] = BarMapping
) -> AsyncIterator[
    tuple[tuple[client.Session, Believer, BarMapping], tuple[client.Session, Believer], Container]
]:
    """A device with a BAR, another one, and a container that the other is attached to."""
    async with with_bar(kind) as owner, believing() as other, open_container(mode) as container:
        await container.attach(other[0])
        yield owner, other, container


def some_of(mapping: BarMapping, offset: int = 0x1000, length: int = 0x2000) -> BarRange:
    """Part of a BAR."""
    return BarRange(mapping, offset, length)


async def set_memory(session: client.Session, enabled: bool) -> None:
    """Write COMMAND."""
    await session.region_write(RegionIndex.CONFIG, COMMAND, MEMORY if enabled else WITHOUT_MEMORY)


def saying(**capabilities: int) -> bytes:
    """VERSION's JSON."""
    return json.dumps({"capabilities": {"max_msg_fds": 8, **capabilities}}).encode() + b"\0"


async def refused(awaitable: Awaitable[object]) -> int:
    """The errno that something is refused with."""
    with pytest.raises(ContainerError) as caught:
        await awaitable
    return caught.value.errno
