"""The sending half of a client's socket: messages leave whole, one after the other, in the order of `put`.

Nothing is copied until the socket has no room; what it does not take waits here, and nothing that is put
later overtakes it.
"""

from __future__ import annotations

import array
import errno
import fcntl
import socket
import sys
import termios
from collections import deque
from collections.abc import Sequence
from typing import Final

import trio

__all__ = ["ClientDroppedError", "ClientLeftError", "Wire", "gone"]

# How the socket reports that the client is gone, whichever way it went.
_GONE: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT})


class ClientLeftError(Exception):
    """The client hung up, as every client does in the end."""


class ClientDroppedError(Exception):
    """The client is hung up on, for the reason told."""


class Wire:
    """Sends on ``client``, a non-blocking unix stream socket that its owner closes.

    Whoever takes nothing for ``patience`` seconds while something waits for him is dropped. All that sends
    raises `ClientLeftError` or `ClientDroppedError` when nothing can be sent any more.
    """

    def __init__(self, client: socket.socket, patience: float) -> None:
        self._socket = client
        self._patience = patience
        self._waiting: deque[tuple[memoryview, Sequence[int]]] = deque()

    @property
    def busy(self) -> bool:
        """Something waits for room, or for the rest of what is before it."""
        return bool(self._waiting)

    def put(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send what the socket takes now; the rest waits for `flush` or `push`.

        The descriptors go with the first byte and stay open until it is gone.
        """
        self._waiting.append((memoryview(message), fds))
        if len(self._waiting) == 1:
            self.push()

    def push(self) -> bool:
        """Send what the socket takes now; whether something is left."""
        while self._waiting:
            message, fds = self._waiting[0]
            sent = self._try_to_send(message, fds)
            if sent < len(message):
                if sent:
                    self._waiting[0] = (message[sent:], ())
                return True
            self._waiting.popleft()
        return False

    async def flush(self) -> None:
        """Wait for the client to take what waits for him, as long as he takes anything at all."""
        while self._waiting:
            await self._wait_writable()
            self.push()

    async def _wait_writable(self) -> None:
        untaken = _untaken(self._socket)
        while True:
            with trio.move_on_after(self._patience) as deadline:
                await trio.lowlevel.wait_writable(self._socket)
            if not deadline.cancelled_caught:
                return
            # Linux reports a unix socket as writable only when most of its buffer is free, so a client that
            # reads slowly is known by what is left there alone.
            before, untaken = untaken, _untaken(self._socket)
            if untaken >= before:
                raise ClientDroppedError("it takes no messages")

    def _try_to_send(self, message: memoryview, fds: Sequence[int]) -> int:
        """How many bytes the socket takes now."""
        try:
            if fds:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
                return self._socket.sendmsg((message,), (rights,), socket.MSG_NOSIGNAL)
            return self._socket.send(message, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise gone(error) from None


def gone(error: OSError) -> ClientLeftError | ClientDroppedError:
    """What an error of the client's socket means."""
    return ClientLeftError() if error.errno in _GONE else ClientDroppedError(error.strerror)


def _untaken(client: socket.socket) -> int:
    """Bytes sent that the client has not taken (unix(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
