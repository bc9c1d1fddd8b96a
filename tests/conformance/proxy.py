"""Stands between the checks and a real server, and lies as a mutation tells it to.

Framing is its own and shares nothing with the rooms.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

HEADER = struct.Struct("=HHIII")
REPLY, NO_REPLY, ERROR = 1, 16, 32


@dataclass(frozen=True)
class Message:
    """A message on its way."""

    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def is_refusal(self) -> bool:
        return bool(self.flags & ERROR)

    def encode(self) -> bytes:
        size = HEADER.size + len(self.payload)
        return HEADER.pack(self.id, self.command, size, self.flags, self.error) + self.payload

    def refusal(self, errno: int) -> Message:
        """The error reply to this request."""
        return Message(self.id, self.command, REPLY | ERROR, errno, b"")

    def granted(self, payload: bytes = b"") -> Message:
        """The reply that grants this request."""
        return Message(self.id, self.command, REPLY, 0, payload)


class Hangup(Exception):  # noqa: N818
    """The proxy closes the connection."""


class Honest:
    """Changes nothing; all mutations begin from it. One for each proxy, with a `begin` for each client."""

    deaf_after_client = False
    """Nobody is served after the first client left."""

    jealous = False
    """A second client ends the first one's stay."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def begin(self) -> None:
        """A client connected."""

    def request(self, message: Message) -> Message | None:
        """What the server gets instead; None: nothing, and `replies` has the answer."""
        return message

    def instead(self, message: Message) -> Sequence[Message]:
        """The answers to a request that the server did not get."""
        return ()

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        """What the client gets instead of the server's answer."""
        return (reply,)

    def question(self, question: Message) -> Message | None:
        """What the client gets instead of a request of the server's; None: nothing."""
        return question

    def unanswered(self, message: Message) -> Sequence[Message]:
        """What the client gets for a request that wants no answer."""
        return ()

    def chunk(self, data: bytes) -> None:
        """Bytes came in one piece; raises Hangup."""

    def close(self) -> None:
        for fd in self.kept:
            os.close(fd)


@dataclass
class _Pipe:
    """One direction's socket with what is left of its last piece."""

    socket: socket.socket
    data: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    sending: trio.Lock = field(default_factory=trio.Lock)

    async def next(self, chunk: Callable[[bytes], None]) -> Message | None:
        while not self._whole():
            await trio.lowlevel.wait_readable(self.socket)
            try:
                piece, rights, _, _ = self.socket.recvmsg(1 << 16, socket.CMSG_SPACE(253 * 4))
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return None
            for _, _, sent in rights:
                self.fds += array.array("i", sent)
            if not piece:
                return None
            chunk(piece)
            self.data += piece
        message_id, command, size, flags, error = HEADER.unpack_from(self.data)
        payload = bytes(self.data[HEADER.size : size])
        del self.data[:size]
        fds, self.fds = (tuple(self.fds), []) if not self.data else ((), self.fds)
        return Message(message_id, command, flags, error, payload, fds)

    def _whole(self) -> bool:
        if len(self.data) < HEADER.size:
            return False
        size: int = HEADER.unpack_from(self.data)[2]
        if not HEADER.size <= size <= 8 << 20:
            raise Hangup
        return len(self.data) >= size

    async def send(self, message: Message) -> None:
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", message.fds))] if message.fds else []
        )
        rest = memoryview(message.encode())
        async with self.sending:
            while rest:
                await trio.lowlevel.wait_writable(self.socket)
                try:
                    sent = self.socket.sendmsg([rest], rights, socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    continue
                except OSError:
                    raise Hangup from None
                rest, rights = rest[sent:], []


class _Relay:
    def __init__(self, client: socket.socket, server: socket.socket, mutation: Honest) -> None:
        self._client, self._server = _Pipe(client), _Pipe(server)
        self._mutation = mutation
        self._asked: list[Message] = []

    async def run(self) -> None:
        with self._client.socket, self._server.socket:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._upward, nursery.cancel_scope)
                nursery.start_soon(self._downward, nursery.cancel_scope)
        for fd in (*self._client.fds, *self._server.fds):
            os.close(fd)

    async def _upward(self, over: trio.CancelScope) -> None:
        with contextlib.suppress(Hangup):
            while (message := await self._client.next(self._mutation.chunk)) is not None:
                changed = self._mutation.request(message)
                if changed is None:
                    for answer in self._mutation.instead(message):
                        await self._client.send(answer)
                else:
                    if not changed.flags & (NO_REPLY | REPLY):
                        self._asked.append(message)
                    await self._server.send(changed)
                    if message.flags & NO_REPLY:
                        for answer in self._mutation.unanswered(message):
                            await self._client.send(answer)
                for fd in message.fds:
                    os.close(fd)
        over.cancel()

    async def _downward(self, over: trio.CancelScope) -> None:
        with contextlib.suppress(Hangup):
            while (message := await self._server.next(lambda data: None)) is not None:
                if message.flags & REPLY:
                    answers = self._mutation.reply(self._asked.pop(0), message)
                else:
                    question = self._mutation.question(message)
                    answers = () if question is None else (question,)
                for answer in answers:
                    await self._client.send(answer)
                for fd in message.fds:
                    os.close(fd)
        over.cancel()


@asynccontextmanager
async def proxied(path: Path, server: Path, mutation: Honest) -> AsyncIterator[None]:
    """A proxy at `path` to the server at another path, one client at a time."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(os.fspath(path))
    listener.listen(4)

    async def serve() -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            client, _ = listener.accept()
            client.setblocking(False)
            upstream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            upstream.connect(os.fspath(server))
            mutation.begin()
            async with trio.open_nursery() as nursery:
                if mutation.jealous:
                    nursery.start_soon(_end_at_next, listener, nursery.cancel_scope)
                await _Relay(client, upstream, mutation).run()
                nursery.cancel_scope.cancel()
            if mutation.deaf_after_client:
                await trio.sleep_forever()

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
                mutation.close()
                os.unlink(path)  # noqa: PTH108


async def _end_at_next(listener: socket.socket, stay: trio.CancelScope) -> None:
    await trio.lowlevel.wait_readable(listener)
    stay.cancel()
