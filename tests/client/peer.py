"""A scripted server on a socketpair, written from the spec's tables with struct and nothing of `protocol`:
an independent witness.
"""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

import client
from protocol import Limits
from protocol.quirks import Overrides

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, IO_FDS, IRQ_INFO, SET_IRQS = 1, 2, 3, 4, 5, 6, 7, 8
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET = 9, 10, 11, 12, 13
WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE = 15, 16, 17, 18
REPLY, NO_REPLY, ERROR = 1, 16, 32
CAPABILITIES = b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":4096}}\0'
TWIN = b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true,"fd_index":0}}}\0'


@dataclass(frozen=True)
class Message:
    """What came: the header's fields, the payload and the descriptors."""

    id: int
    command: int
    flags: int
    payload: bytes
    fds: tuple[int, ...]


@dataclass(frozen=True)
class FakeRegion:
    """A region to be described; the chain is the bytes after the record."""

    size: int = 0
    flags: int = 3
    chain: bytes = b""
    fds: tuple[int, ...] = ()
    offset: int = 0


class Peer:
    """One end of a socketpair; tests script it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._data = b""
        self._fds: list[int] = []

    async def _fill(self, size: int) -> None:
        while len(self._data) < size:
            await trio.lowlevel.wait_readable(self.sock)
            data, control, _, _ = self.sock.recvmsg(size - len(self._data), 1024)
            if not data:
                raise EOFError
            self._data += data
            for _level, _kind, payload in control:
                self._fds += array.array("i", payload)

    async def next(self) -> Message:
        """The next message, read as QEMU does: a header, then its payload. Raises EOFError at the end."""
        await self._fill(16)
        message_id, command, size, flags, error = struct.unpack("=HHIII", self._data)
        assert size >= 16
        assert error == 0
        await self._fill(size)
        payload, self._data = self._data[16:], b""
        fds, self._fds = tuple(self._fds), []
        return Message(message_id, command, flags, payload, fds)

    async def next_raw(self) -> tuple[int, int, int, int, int]:
        """The next header as it is."""
        await self._fill(16)
        data, self._data = self._data, b""
        message_id, command, size, flags, error = struct.unpack("=HHIII", data)
        return message_id, command, size, flags, error

    async def expect(self, command: int) -> Message:
        """The next message, which must be this command."""
        message = await self.next()
        assert message.command == command, message
        return message

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Raw bytes."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        assert self.sock.sendmsg([data], rights) == len(data)

    def reply(
        self,
        to: Message,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
        *,
        flags: int = REPLY,
        error: int = 0,
    ) -> None:
        """Answer a message."""
        self.send(struct.pack("=HHIII", to.id, to.command, 16 + len(payload), flags, error) + payload, fds)

    def ask(self, command: int, payload: bytes = b"", *, id: int = 7, flags: int = 0) -> None:  # noqa: A002
        """Send a command of the server's."""
        self.send(struct.pack("=HHIII", id, command, 16 + len(payload), flags, 0) + payload)

    async def answered(self) -> tuple[Message, int]:
        """The next message, which must be a reply, and its errno."""
        await self._fill(16)
        message_id, command, size, flags, error = struct.unpack("=HHIII", self._data)
        assert flags == (REPLY | ERROR if error else REPLY)
        await self._fill(size)
        payload, self._data = self._data[16:], b""
        return Message(message_id, command, flags, payload, ()), error

    def refuse(self, to: Message, errno: int) -> None:
        """Answer a message with an error."""
        self.reply(to, flags=REPLY | ERROR, error=errno)

    async def agree(self, capabilities: bytes = CAPABILITIES, fds: tuple[int, ...] = ()) -> Message:
        """Take VERSION and agree to it."""
        message = await self.expect(VERSION)
        self.reply(message, struct.pack("=HH", 0, 0) + capabilities, fds)
        return message

    async def describe(
        self,
        regions: Mapping[int, FakeRegion],
        irqs: tuple[int, ...] = (1, 32, 4, 1, 1),
        intx_flags: int = 7,
    ) -> None:
        """Answer the questions at the beginning of a session: 9 regions, 5 kinds of interrupts."""
        info = await self.expect(GET_INFO)
        assert info.payload == struct.pack("=IIII", 16, 0, 0, 0)
        self.reply(info, struct.pack("=IIII", 16, 3, 9, 5))
        for index in range(9):
            await self.describe_region(index, regions.get(index, FakeRegion()))
        for index, count in enumerate(irqs):
            asked = await self.expect(IRQ_INFO)
            assert struct.unpack("=IIII", asked.payload)[2] == index
            flags = (intx_flags, 9, 1, 9, 9)[index]  # vfio-pci's: MSI, ERR and REQ do not grow
            self.reply(asked, struct.pack("=IIII", 16, flags, index, count))

    async def describe_region(self, index: int, region: FakeRegion) -> None:
        """Answer for a region, as often as it takes."""
        while True:
            asked = await self.expect(REGION_INFO)
            argsz, _, number, _, _, _ = struct.unpack("=IIIIQQ", asked.payload)
            assert number == index
            needed = 32 + len(region.chain)
            fits = argsz >= needed
            flags = region.flags | (8 if region.chain and fits else 0)
            record = struct.pack(
                "=IIIIQQ", needed, flags, index, 32 if flags & 8 else 0, region.size, region.offset
            )
            self.reply(asked, record + (region.chain if fits else b""), region.fds)
            if fits:
                return


@asynccontextmanager
async def session_with(
    script: Callable[[Peer], object] | None = None,
    *,
    regions: Mapping[int, FakeRegion] | None = None,
    irqs: tuple[int, ...] = (1, 32, 4, 1, 1),
    intx_flags: int = 7,
    capabilities: bytes = CAPABILITIES,
    limits: Limits | None = None,
    quirks: Overrides | None = None,
    fds: tuple[int, ...] = (),
) -> AsyncIterator[tuple[client.Session, Peer]]:
    """A session and its scripted server after the questions of the beginning; `script` runs before them, and
    `fds` go with the agreement.
    """
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)

    async def begin() -> None:
        if script is not None:
            script(peer)
        await peer.agree(capabilities, fds)
        await peer.describe(regions or {}, irqs, intx_flags)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            async with client.over_socket(ours, limits=limits, quirks=quirks) as session:
                yield session, peer
    finally:
        theirs.close()
