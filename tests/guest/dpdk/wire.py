"""The other end of a card's cable: a unix stream socket with each frame behind its length."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import trio

_LENGTH = struct.Struct("!I")
_PATIENCE = 20  # seconds; a frame takes milliseconds


class Wire:
    """What the port ``stream:listen=PATH`` is connected to, plugged in as a context manager."""

    def __init__(self, path: Path) -> None:
        self.port = f"stream:listen={path}"
        """The port at whose other end this is."""
        self._path = path
        self._stream: trio.SocketStream | None = None
        self._buffer = bytearray()

    async def __aenter__(self) -> Wire:
        await self.plug_in()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.pull_out()

    async def plug_in(self) -> None:
        """Connect: the card's link is up."""
        self._stream = await trio.open_unix_socket(self._path)
        self._buffer.clear()

    async def pull_out(self) -> None:
        """Disconnect: the card's link is down."""
        assert self._stream is not None
        await self._stream.aclose()

    async def send(self, *frames: bytes) -> None:
        """Frames for the card."""
        assert self._stream is not None
        await self._stream.send_all(b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames))

    async def receive(self) -> bytes:
        """The card's next frame; TooSlowError if there is none."""
        with trio.fail_after(_PATIENCE):
            return await self._next()

    async def send_back(self) -> None:
        """Be a mirror."""
        while True:
            await self.send(await self._next())

    def forget(self) -> None:
        """Drop what the card has sent."""
        assert self._stream is not None
        self._buffer.clear()
        with suppress(BlockingIOError):
            while os.read(self._stream.socket.fileno(), 1 << 16):
                pass

    async def _next(self) -> bytes:
        (length,) = _LENGTH.unpack(await self._take(_LENGTH.size))
        return await self._take(length)

    async def _take(self, count: int) -> bytes:
        assert self._stream is not None
        while len(self._buffer) < count:
            part = await self._stream.receive_some()
            assert part, "the card has pulled the cable"
            self._buffer += part
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken
