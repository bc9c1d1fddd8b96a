"""One client's stay on a card: the bytes of its socket to the PCI function and back.

The loop drains: it takes from the socket without waiting, answers, sends each reply whole, and takes again;
only when nothing is there does it sleep. Register accesses stay within `_drain`, where that costs least;
the rest is done here. Guarantees:

- Requests are handled in the order in which they came, each before the next one is looked at.
- No descriptor that a client sent outlives the handling of its message, unless the device made its own
  copy.
- At most one reply waits to be sent; while it waits nothing more is read, so a client that does not read
  its replies is held by its own requests, and dropped after a while.
- However the stay ends, the function is reset with `ResetKind.LOST_CLIENT` if the client had come to terms.
"""

from __future__ import annotations

import array
import errno
import fcntl
import logging
import os
import socket
import sys
import termios
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import trio

from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from protocol import Broken, Connection, Event, Negotiated, Refused, Request, Role, command_name
from server._drain import Drain, Outcome
from server._resample import Resample
from server.dispatch import handle
from server.limits import SessionLimits

__all__ = ["Session"]

log = logging.getLogger("trionic.server")

# How the socket reports that the client is gone, whichever way it went.
_GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT})


class _ClientLeftError(Exception):
    """The client hung up, as every client does in the end."""


class _ClientDroppedError(Exception):
    """The client is hung up on, for the reason told."""


class Session:
    """Serves ``function`` to the client at the other end of ``client``, a non-blocking unix stream socket.

    Takes over the socket: it is closed when `run` ends.
    """

    def __init__(
        self,
        function: PciFunction,
        client: socket.socket,
        *,
        poll_us: int = 0,
        limits: SessionLimits | None = None,
    ) -> None:
        self._function = function
        self._socket = client
        self._limits = limits or SessionLimits()
        self._engine = Connection(Role.SERVER)
        self._drain = Drain(
            client.fileno(), function.region_read, function.region_write, self._failed, poll_us=poll_us
        )
        self._patience = trio.CancelScope(deadline=trio.current_time() + self._limits.version_deadline)
        self._negotiated = False
        self._tellings_left = self._limits.tellings

    async def run(self) -> None:
        """Serve until the client leaves or is dropped; raises nothing because of what a client does."""
        try:
            with self._patience:
                async with trio.open_nursery() as nursery:
                    self._resample = Resample(self._function, nursery)
                    try:
                        await self._serve()
                    except _ClientLeftError:
                        log.info("%s: client left", self._function.name)
                    except _ClientDroppedError as reason:
                        log.warning("%s: client dropped: %s", self._function.name, reason)
                    finally:
                        nursery.cancel_scope.cancel()
            if self._patience.cancelled_caught:
                log.warning("%s: client dropped: it does not say VERSION", self._function.name)
        finally:
            self._end()

    def _end(self) -> None:
        _close_all(self._engine.close())
        self._socket.close()
        if self._negotiated:
            self._function.reset(ResetKind.LOST_CLIENT)

    async def _serve(self) -> None:
        drain = self._drain
        drain.credit = self._limits.messages_per_turn
        while True:
            try:
                outcome = drain.run()
            except OSError as error:
                raise _gone(error) from None
            if outcome == Outcome.OTHER:
                await self._take(*drain.take())
            elif outcome == Outcome.BLOCKED:
                await self._send_rest(drain.take_unsent(), ())
            elif outcome == Outcome.GONE:
                raise _ClientLeftError
            else:
                if outcome == Outcome.EMPTY:
                    await trio.lowlevel.wait_readable(self._socket)
                else:
                    await trio.lowlevel.checkpoint()
                drain.credit = self._limits.messages_per_turn

    async def _take(self, data: memoryview, fds: Sequence[int], fds_lost: bool) -> None:
        events = deque(self._engine.receive(data, fds, fds_lost=fds_lost))
        try:
            if self._engine.closed:
                self._break(events)
            while events:
                event = events.popleft()
                try:
                    reply, reply_fds = self._answer(event)
                finally:
                    _close_all(event.fds)
                if reply:
                    await self._send(reply, reply_fds)
                self._drain.credit -= 1
                if self._drain.credit <= 0:
                    await trio.lowlevel.checkpoint()
                    self._drain.credit = self._limits.messages_per_turn
        finally:
            for event in events:
                _close_all(event.fds)
        self._drain.direct = self._engine.ready and self._engine.at_boundary

    def _break(self, events: Iterable[Event]) -> None:
        """The client broke the protocol: tell it, if its message can be answered, and let go of it."""
        for event in events:
            if isinstance(event, Broken):
                if event.farewell:
                    self._try_to_send(event.farewell, ())
                raise _ClientDroppedError(event.error)

    def _answer(self, event: Event) -> tuple[bytes, Sequence[int]]:
        match event:
            case Request():
                return self._handle(event)
            case Refused():
                self._tell("%s: %s", self._function.name, event.reason)
                return self._engine.error(event, event.errno), ()
            case Negotiated():
                self._negotiated = True
                self._patience.deadline = float("inf")
                return event.reply, ()
            case _:
                return b"", ()  # a server asks for nothing, so no reply is its

    def _handle(self, request: Request) -> tuple[bytes, Sequence[int]]:
        try:
            answer = handle(self._function, request, send_fds=self._engine.peer.max_msg_fds > 0)
            self._resample.follow(request)
        except Exception as error:
            return self._engine.error(request, self._failed(request.command, error)), ()
        return self._engine.reply(request, answer.body, answer.data, answer.fds), answer.fds

    def _failed(self, command: int, error: Exception) -> int:
        """The errno that tells the client of ``error``: the device's refusal, or a mistake in its code."""
        if isinstance(error, DeviceError):
            log.debug("%s: %s refused: %s", self._function.name, command_name(command), error)
            return error.errno or errno.EIO
        self._tell("%s: %s failed", self._function.name, command_name(command), error=error)
        return errno.EIO

    def _tell(self, text: str, *args: object, error: Exception | None = None) -> None:
        """Log what a client can bring about as often as it likes, up to a limit."""
        if self._tellings_left > 0:
            self._tellings_left -= 1
            log.warning(text, *args, exc_info=error)
            if self._tellings_left == 0:
                log.warning("%s: no more of this client is told", self._function.name)

    async def _send(self, message: bytes, fds: Sequence[int]) -> None:
        """Send the whole message; the descriptors go with its first byte."""
        sent = self._try_to_send(message, fds)
        if sent < len(message):
            await self._send_rest(message[sent:], () if sent else fds)

    async def _send_rest(self, rest: bytes, fds: Sequence[int]) -> None:
        """Wait for the client to take what its socket did not, as long as it takes anything at all."""
        while rest:
            await self._wait_writable()
            sent = self._try_to_send(rest, fds)
            if sent:
                rest, fds = rest[sent:], ()

    async def _wait_writable(self) -> None:
        untaken = _untaken(self._socket)
        while True:
            with trio.move_on_after(self._limits.send_deadline) as deadline:
                await trio.lowlevel.wait_writable(self._socket)
            if not deadline.cancelled_caught:
                return
            # Linux reports a unix socket as writable only when most of its buffer is free, so a client that
            # reads slowly is known by what is left there alone.
            before, untaken = untaken, _untaken(self._socket)
            if untaken >= before:
                raise _ClientDroppedError("it takes no replies")

    def _try_to_send(self, message: bytes | memoryview, fds: Sequence[int]) -> int:
        """How many bytes the socket takes now."""
        try:
            if fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                return self._socket.sendmsg((message,), (rights,), socket.MSG_NOSIGNAL)
            return self._socket.send(message, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _gone(error) from None


def _untaken(client: socket.socket) -> int:
    """Bytes sent that the client has not taken (unix(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def _gone(error: OSError) -> _ClientLeftError | _ClientDroppedError:
    return _ClientLeftError() if error.errno in _GONE else _ClientDroppedError(error.strerror)
