"""A scripted PCI function with a mappable BAR 0, whose memory a test can watch while messages arrive."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from errno import EIO
from typing import Final

import trio

import client
from client.decoding import MemoryDecoding
from client.pci import ConfigSpace
from tests.client.bar_files import memory
from tests.client.peer import (
    CAPABILITIES,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    RESET,
    FakeRegion,
    Message,
    Peer,
    session_with,
)

CONFIG: Final = 7
SIZE: Final = 0x4000
COMMAND, PM, PCIE, AF = 0x04, 0x40, 0x50, 0x90
"""Offsets of the command register and of the capabilities that switch a function off."""

MEMORY_ON, MEMORY_OFF = b"\2\0", b"\0\0"
D0, D3_HOT = b"\0\0", b"\3\0"
FLR, AF_FLR = b"\0\x80", b"\1"


def config_space(*, flr: bool = True, no_soft_reset: bool = True) -> bytearray:
    """PM at 0x40, PCI Express at 0x50, advanced features at 0x90."""
    raw = bytearray(256)
    struct.pack_into("<HHHH", raw, 0, 0x1AF4, 0x1041, 2, 0x10)
    raw[0x34] = PM
    struct.pack_into("<BBHH", raw, PM, 0x01, PCIE, 3, no_soft_reset << 3)
    struct.pack_into("<BBHIH", raw, PCIE, 0x10, AF, 2, flr << 28, 0)
    struct.pack_into("<BBBBB", raw, AF, 0x13, 0, 6, 3 if flr else 0, 0)
    return raw


@dataclass
class Device:
    """What came, and how it is answered. `watch` is called when something that writes arrives, before it is
    answered; `refuse` makes the next such answer an errno, `silent` none at all.
    """

    session: client.Session
    fd: int
    config: bytearray
    log: list[tuple[int, int, bytes]] = field(default_factory=list)
    watch: Callable[[], object] = lambda: None
    refuse: int = 0
    silent: bool = False
    bar_errno: int = 0

    async def serve(self, peer: Peer) -> None:
        """Until the session ends."""
        with suppress(EOFError, ConnectionError):
            while True:
                self._answer(peer, await peer.next())

    def _answer(self, peer: Peer, message: Message) -> None:
        if message.command == RESET:
            self.log.append((RESET, 0, b""))
            self._written(peer, message, b"")
            return
        offset, region, count = struct.unpack_from("=QII", message.payload)
        if region != CONFIG and self.bar_errno:
            if message.flags != NO_REPLY:
                peer.refuse(message, self.bar_errno)
        elif message.command == REGION_READ:
            data = bytes(self.config[offset : offset + count]) if region == CONFIG else b"m" * count
            peer.reply(message, message.payload[:16] + data)
        else:
            assert message.command == REGION_WRITE
            self.log.append((region, offset, message.payload[16:]))
            self._written(peer, message, message.payload[:16])

    def _written(self, peer: Peer, message: Message, answer: bytes) -> None:
        self.watch()
        refuse, self.refuse = self.refuse, 0
        if message.flags == NO_REPLY or self.silent:
            return
        if refuse:
            peer.refuse(message, refuse)
        else:
            peer.reply(message, answer)

    async def write_config(self, offset: int, data: bytes) -> None:
        """By our session."""
        await self.session.region_write(CONFIG, offset, data)

    async def switch(self, *, memory: bool) -> None:
        """COMMAND.MEMORY."""
        await self.write_config(COMMAND, MEMORY_ON if memory else MEMORY_OFF)

    def cut(self) -> None:
        """The server takes the memory away by itself, and refuses messages."""
        os.truncate(self.fd, 0)
        self.bar_errno = EIO

    def give_back(self) -> None:
        """It has it again."""
        os.truncate(self.fd, SIZE)
        os.pwrite(self.fd, b"here", 0)
        self.bar_errno = 0


@asynccontextmanager
async def pci_device(
    config: bytearray | None = None, *, bar: FakeRegion | None = None, capabilities: bytes = CAPABILITIES
) -> AsyncIterator[Device]:
    """A session with it. BAR 0 begins with b"here", and says "mm.." by message."""
    config = config_space() if config is None else config
    with memory(SIZE) as fd:
        os.pwrite(fd, b"here", 0)
        regions = {
            0: bar or FakeRegion(SIZE, 7, b"", (fd,)),
            CONFIG: FakeRegion(len(config)),
        }
        async with (
            session_with(regions=regions, capabilities=capabilities) as (session, peer),
            trio.open_nursery() as nursery,
        ):
            device = Device(session, fd, config)
            nursery.start_soon(device.serve, peer)
            yield device
            nursery.cancel_scope.cancel()


class Switch:
    """The decoding of a device that does what it is told, without a session or a loop."""

    def __init__(self) -> None:
        self.decoding = MemoryDecoding(object())  # type: ignore[arg-type]
        self.decoding.learn(ConfigSpace(bytes(config_space())))

    def _do(self, call: Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]) -> None:
        async def nothing() -> None:
            await trio.lowlevel.checkpoint()

        trio.run(call, nothing)

    def write(self, offset: int, data: bytes) -> None:
        """To configuration space."""
        self._do(lambda nothing: self.decoding.around_write(offset, data, nothing))

    def memory(self, *, on: bool) -> None:
        """COMMAND.MEMORY."""
        self.write(COMMAND, MEMORY_ON if on else MEMORY_OFF)

    def reset(self) -> None:
        """DEVICE_RESET."""
        self._do(lambda nothing: self.decoding.around_reset(nothing))
