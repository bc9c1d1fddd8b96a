"""What the server asks for and how it is answered, on whichever socket it asks."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

from client._socket import close_all
from client._wire import Wire
from client.windows import WindowError, Windows
from protocol import Broken, Command, Connection, Event, Refused, Request
from protocol.messages import DmaAccess


def answer(wire: Wire, windows: Windows, event: Request | Refused) -> str | None:
    """Answer an event of this wire; gives a reason to leave the server, or None."""
    if wire.connection.closed:
        return None
    if not wire.may_answer():
        return "the server asks for more and more and reads no answers"
    message = _message(wire.connection, windows, event)
    if message:
        with suppress(OSError):  # it left before it was answered: the reader will see
            wire.queue(message, answer=True)
    return None


def _message(connection: Connection, windows: Windows, event: Request | Refused) -> bytes:
    if isinstance(event, Refused):
        return connection.error(event, event.errno)
    access = event.body
    assert isinstance(access, DmaAccess)
    try:
        if event.command == Command.DMA_WRITE:
            windows.write(access.address, event.data)
            return connection.reply(event, access)
        if event.no_reply:
            return b""
        return connection.reply(event, access, windows.read(access.address, access.count))
    except WindowError as error:
        return connection.error(event, error.errno)


class Twin:
    """The socket that the server has for its own commands (spec, "twin_socket").

    Its end says nothing about the session: what the server answered before it left may still be unread on
    the other one. A breach of the protocol ends both.
    """

    def __init__(
        self, sock: socket.socket, connection: Connection, windows: Windows, end: Callable[[str], None]
    ) -> None:
        self.wire = Wire(sock, connection, self)
        self._windows = windows
        self._end = end

    def handle(self, event: Event) -> None:
        """Answer what is asked; nothing else can come where nothing was asked."""
        close_all(event.fds)
        if isinstance(event, Broken):
            self._end(f"the server breaks the protocol on its twin socket: {event.error}")
        elif isinstance(event, Request | Refused):
            reason = answer(self.wire, self._windows, event)
            if reason is not None:
                self._end(reason)

    def cannot_send(self, reason: str) -> None:
        """The server left, or wants no answers."""

    def ended(self, reason: str) -> None:
        """The server asks for nothing more here."""
        self.wire.end()

    def drained(self) -> None:
        """Answers do not wait for each other."""
