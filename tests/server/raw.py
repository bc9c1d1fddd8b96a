"""A client written from the specification's tables alone: it shares no code with the server."""

import array
import json
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_IO_FDS, GET_IRQ_INFO, SET_IRQS = range(1, 9)
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET = range(9, 14)
WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE = range(15, 19)

REPLY, NO_REPLY, ERROR = 0x1, 0x10, 0x20

NONE, BOOL, EVENTFD, MASK, UNMASK, TRIGGER = (1 << bit for bit in range(6))
INTX, MSI, MSIX, ERR, REQ = range(5)

CONFIG = 7

CAPABILITIES: dict[str, Any] = {"max_msg_fds": 8, "max_data_xfer_size": 1048576}


@dataclass
class Message:
    """A reply as it came."""

    message_id: int
    command: int
    size: int
    flags: int
    error: int
    payload: bytes
    fds: list[int]

    def close(self) -> None:
        """Close the descriptors that came along."""
        for fd in self.fds:
            os.close(fd)

    def unpack(self, fields: str) -> tuple[Any, ...]:
        """The fields at the start of the payload."""
        return struct.unpack_from("=" + fields, self.payload)


def message(
    command: int, payload: bytes = b"", *, message_id: int = 1, flags: int = 0, size: int | None = None
) -> bytes:
    """The bytes of a request."""
    return struct.pack("=HHIII", message_id, command, size or 16 + len(payload), flags, 0) + payload


def version(capabilities: object = CAPABILITIES, major: int = 0, minor: int = 1) -> bytes:
    """The bytes of a VERSION request."""
    data = json.dumps({"capabilities": capabilities}).encode() + b"\0"
    return message(VERSION, struct.pack("=HH", major, minor) + data)


def access(offset: int, region: int, count: int) -> bytes:
    """The payload of a REGION_READ, and the start of that of a REGION_WRITE."""
    return struct.pack("=QII", offset, region, count)


def irqs(flags: int, index: int, start: int, count: int, data: bytes = b"") -> bytes:
    """The payload of a SET_IRQS."""
    return struct.pack("=IIIII", 20 + len(data), flags, index, start, count) + data


def dma(address: int, size: int, *, flags: int = 3, offset: int = 0) -> bytes:
    """The payload of a DMA_MAP."""
    return struct.pack("=IIQQQ", 32, flags, offset, address, size)


class RawClient:
    """A connection that sends what it is told and shows what comes back."""

    def __init__(self, connected: trio.socket.SocketType) -> None:
        self.socket = connected
        self._next_id = 100

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put bytes on the wire, with descriptors."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = await self.socket.sendmsg([data], rights)
        while sent < len(data):
            sent += await self.socket.send(data[sent:])

    async def receive(self) -> Message | None:
        """The next message; None: the server hung up."""
        fds: list[int] = []
        data = b""
        wanted = 16
        while len(data) < wanted:
            try:
                piece, ancillary, _, _ = await self.socket.recvmsg(
                    wanted - len(data), socket.CMSG_SPACE(64 * 4)
                )
            except ConnectionResetError:
                piece, ancillary = b"", []
            if not piece:
                assert not data, f"the server hung up within a message: {data!r}"
                return None
            for _, _, rights in ancillary:
                fds += array.array("i", rights).tolist()
            data += piece
            if len(data) == 16:
                wanted = struct.unpack_from("=I", data, 4)[0]
        message_id, command, size, flags, error = struct.unpack_from("=HHIII", data)
        return Message(message_id, command, size, flags, error, data[16:], fds)

    async def ask(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """A request and its reply, whether it is granted or refused."""
        self._next_id = (self._next_id + 1) & 0xFFFF
        await self.send(message(command, payload, message_id=self._next_id), fds)
        reply = await self.receive()
        assert reply is not None, "the server hung up"
        assert (reply.message_id, reply.command) == (self._next_id, command)
        assert reply.flags & ~ERROR == REPLY
        assert reply.size == 16 + len(reply.payload)
        if reply.flags & ERROR:
            assert not reply.payload
            assert reply.error
        else:
            assert reply.error == 0
        return reply

    async def do(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Message:
        """A request that must be granted."""
        reply = await self.ask(command, payload, fds)
        assert not reply.flags & ERROR, os.strerror(reply.error)
        return reply

    async def refused(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> int:
        """The errno of a request that must be refused."""
        reply = await self.ask(command, payload, fds)
        assert reply.flags & ERROR
        assert not reply.fds
        return reply.error

    async def negotiate(self, capabilities: object = CAPABILITIES) -> Message:
        """Agree on a version."""
        await self.send(version(capabilities))
        reply = await self.receive()
        assert reply is not None
        assert not reply.flags & ERROR
        return reply

    async def read(self, region: int, offset: int, count: int) -> bytes:
        """The bytes of a region."""
        reply = await self.do(REGION_READ, access(offset, region, count))
        assert reply.payload[:16] == access(offset, region, count)
        return reply.payload[16:]

    async def write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region."""
        reply = await self.do(REGION_WRITE, access(offset, region, len(data)) + data)
        assert reply.payload == access(offset, region, len(data))

    async def hung_up(self) -> bool:
        """Waits until the server hangs up; False if it says something instead."""
        return await self.receive() is None


async def connect(path: Path) -> RawClient:
    """A client that has said nothing yet."""
    connecting = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await connecting.connect(os.fspath(path))
    return RawClient(connecting)
