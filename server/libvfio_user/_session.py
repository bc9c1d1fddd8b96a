"""One client's stay on a card that the library serves.

Whoever calls the library must not wait: all cards share one thread. So a message is given to it only when
the whole of it is in the socket and the socket has room for a reply.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import struct
import sys
import termios
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from errno import EBUSY, ENOTCONN
from pathlib import Path
from typing import Final

import trio

from device.dma import PinnedError
from device.function import PciFunction
from protocol import command_name
from protocol.errors import RemoteProtocolError
from protocol.limits import HEADER_SIZE, MAX_VERSION_DATA, SessionLimits
from protocol.messages import Header
from server._answer import Terms
from server._descriptors import close_all, receive
from server._unpinning import tell_balance, unpinned
from server._wire import ClientDroppedError, ClientLeftError
from server.libvfio_user._context import Context
from server.libvfio_user._exports import answer, asks_for_export, terms_of
from server.libvfio_user._handover import hand_over
from server.libvfio_user._interrupts import Bridge
from server.libvfio_user._leaving import check_pins, may_take
from server.libvfio_user._remote import TwinMemory
from server.libvfio_user._screen import LONGEST_LOOK, Screen, parse_header, refusal
from server.libvfio_user._told import Told, log
from server.libvfio_user.library import Library, LibraryError

__all__ = ["Session"]

# Seconds for the rest of a message of which a part has come: peers send a message in one call.
_REST_DEADLINE: Final = 5.0
_REST_PAUSE: Final = 0.001  # nothing wakes us when more of a message has come

# Seconds that one reply may take to leave, for the library sends it in a call that waits.
_REPLY_PATIENCE: Final = 1

# The library asks in pieces of what the client takes; more at once would only hold its thread longer.
_MAX_DMA_BY_MESSAGE: Final = 1 << 20

_MAX_VERSION_SIZE: Final = HEADER_SIZE + 4 + MAX_VERSION_DATA

_TIMEVAL: Final = "@ll"  # struct timeval


class Session:
    """Serves ``function`` to ``client``, a socket that it takes over, by a context of ``library``, which
    makes its own socket at ``path`` and needs it for a moment only.
    """

    def __init__(
        self,
        function: PciFunction,
        client: socket.socket,
        *,
        library: Library,
        path: Path,
        poll_us: int = 0,
        limits: SessionLimits | None = None,
    ) -> None:
        self._library = library
        self._function = function
        self._socket = client
        self._path = path
        self._poll_ns = 1000 * poll_us
        self._limits = limits or SessionLimits()
        self._told = Told(function.name, self._limits.tellings)
        self._room = select.poll()
        self._room.register(client, select.POLLOUT)

    async def run(self) -> None:
        """Serve until the client leaves or is dropped; raises nothing because of what a client does."""
        with self._socket:
            try:
                version = await self._version()
                await self._serve(version)
            except ClientLeftError:
                log.info("%s: client left", self._function.name)
            except ClientDroppedError as reason:
                log.warning("%s: client dropped: %s", self._function.name, reason)

    async def _serve(self, version: bytes) -> None:
        with ExitStack() as ending:
            try:
                context = Context(self._library, self._function, self._path, self._told)
                ending.callback(context.close)
                twin = hand_over(context, self._socket, self._path, version)
            except (LibraryError, OSError) as error:
                raise ClientDroppedError(f"VERSION: {error}") from None
            ending.callback(tell_balance, self._function, log.debug)
            ending.callback(context.lost)
            if twin is not None:
                self._reach_memory(
                    TwinMemory(context, self._function.gate, twin, self._limits.dma_deadline, self._hang_up),
                    ending,
                )
            self._let_wait()
            bridge = Bridge(self._function, context.trigger, self._told)
            ending.callback(bridge.close)
            await self._until_the_end(context, bridge, terms_of(version))

    def _reach_memory(self, memory: TwinMemory, ending: ExitStack) -> None:
        dma = self._function.dma

        def forget() -> None:
            memory.close()
            with self._function.gate:
                dma.remote = None

        ending.callback(forget)
        with self._function.gate:
            dma.remote_limit = _MAX_DMA_BY_MESSAGE
            dma.remote = memory

    def _hang_up(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def _until_the_end(self, context: Context, bridge: Bridge, terms: Terms) -> None:
        end: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bridge.run)
            try:
                await self._drain(context, bridge, terms)
            except (ClientLeftError, ClientDroppedError) as reason:
                end = reason
                nursery.cancel_scope.cancel()
        if end is not None:
            raise end

    async def _drain(self, context: Context, bridge: Bridge, terms: Terms) -> None:
        screen = Screen(context.windows)
        credit = self._limits.messages_per_turn
        while True:
            bridge.follow()
            look = self._look()
            if not look:
                await trio.lowlevel.wait_readable(self._socket)
                credit = self._limits.messages_per_turn
                continue
            header, look = await self._whole(look)
            await self._wait_for_room()
            number = screen.verdict(header, look)
            if number:
                self._refuse(header, number)
            elif asks_for_export(header, look):
                payload = self._take(header.message_size)[HEADER_SIZE:]
                self._send(*answer(self._function, header, payload, terms))
            else:
                await self._give(context, header, look)
            credit -= 1
            if credit <= 0:
                await trio.lowlevel.checkpoint()
                credit = self._limits.messages_per_turn

    async def _give(self, context: Context, header: Header, look: bytes) -> None:
        """Let the library handle the message, once nobody holds what it takes away."""
        if not may_take(header):
            self._run(context)
            return
        try:
            with self._function.gate:
                check_pins(self._function, header, look)
                self._run(context)
        except PinnedError as held:

            def tell(reason: str) -> None:
                self._told(f"{command_name(header.command)} {reason}")

            try:
                async with unpinned(self._function, held, self._socket, self._limits.unpin_deadline, tell):
                    self._run(context)
            except PinnedError:
                self._refuse(header, EBUSY)

    def _run(self, context: Context) -> None:
        try:
            context.run()
        except LibraryError as error:
            raise _gone(error) from None

    # --- messages

    def _peek(self) -> bytes:
        """What begins the next message; BlockingIOError when nothing is there."""
        try:
            look = self._socket.recv(LONGEST_LOOK, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise
        except OSError:
            raise ClientLeftError from None
        if not look:
            raise ClientLeftError
        return look

    def _look(self) -> bytes:
        """`_peek`, tried for as long as the card spins; empty when nothing comes."""
        end = 0
        while True:
            try:
                return self._peek()
            except BlockingIOError:
                if not self._poll_ns:
                    return b""
                now = time.monotonic_ns()
                end = end or now + self._poll_ns
                if now >= end:
                    return b""

    async def _version(self) -> bytes:
        """The client's first message, whole and taken from the socket, in however many pieces it comes."""
        with trio.move_on_after(self._limits.version_deadline):
            head = await self._receive(HEADER_SIZE)
            size = _parse(head).message_size
            if size > _MAX_VERSION_SIZE:
                raise ClientDroppedError(f"VERSION of {size} bytes")
            return head + await self._receive(size - HEADER_SIZE)
        raise ClientDroppedError("it does not say VERSION")

    async def _receive(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            await trio.lowlevel.wait_readable(self._socket)
            self._peek()  # raises when there is nobody
            received += self._take_some(size - len(received))
        return received

    async def _whole(self, look: bytes) -> tuple[Header, bytes]:
        """The header of the message that begins with ``look``, and its start, once all of it is there."""
        if len(look) < HEADER_SIZE:
            await self._wait_for(HEADER_SIZE)
            look = self._peek()
            if len(look) < HEADER_SIZE:
                raise ClientDroppedError("it cuts a header where descriptors are")
        header = _parse(look)
        if header.message_size > len(look):
            await self._wait_for(header.message_size)
            look = self._peek()
        return header, look

    async def _wait_for(self, size: int) -> None:
        """Until so many bytes are in the socket."""
        with trio.move_on_after(_REST_DEADLINE):
            while True:
                gone = any(events & select.POLLHUP for _, events in self._room.poll(0))
                if self._untaken() >= size:
                    return
                if gone:
                    raise ClientLeftError
                await trio.sleep(_REST_PAUSE)
        raise ClientDroppedError(f"of {size} bytes of a message only {self._untaken()} came")

    def _untaken(self) -> int:
        """Bytes that wait in the socket."""
        return int.from_bytes(fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4)), sys.byteorder)

    async def _wait_for_room(self) -> None:
        """Until most of the socket's buffer is free: the library's reply then leaves without waiting."""
        if self._room.poll(0):
            return
        with trio.move_on_after(self._limits.send_deadline):
            await trio.lowlevel.wait_writable(self._socket)
            return
        raise ClientDroppedError("it takes no replies")

    def _take_some(self, size: int) -> bytes:
        """Some of the bytes that are there, `size` at most; what descriptors they brought are closed."""
        data, fds, _ = receive(self._socket, size)
        close_all(fds)
        return data

    def _refuse(self, header: Header, number: int) -> None:
        """Answer the message instead of the library."""
        self._take(header.message_size)
        log.debug("%s: command %d refused: %s", self._function.name, header.command, os.strerror(number))
        self._send(refusal(header, number))

    def _take(self, size: int) -> bytes:
        """A message that is there, so many bytes long."""
        taken = b""
        while len(taken) < size:
            taken += self._take_some(size - len(taken))
        return taken

    def _send(self, reply: bytes, fds: Sequence[int] = ()) -> None:
        """What finds room at once; b"" is nothing."""
        if reply:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            try:
                self._socket.sendmsg([reply], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except OSError:
                raise ClientLeftError from None

    def _let_wait(self) -> None:
        """Give the connection the flags that the library expects, and an end to its waiting."""
        self._socket.setblocking(True)
        patience = struct.pack(_TIMEVAL, _REPLY_PATIENCE, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)


def _parse(look: bytes) -> Header:
    try:
        return parse_header(look)
    except RemoteProtocolError as error:
        raise ClientDroppedError(str(error)) from None


def _gone(error: LibraryError) -> ClientLeftError | ClientDroppedError:
    return ClientLeftError() if error.errno == ENOTCONN else ClientDroppedError(str(error))
