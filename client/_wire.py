"""One socket with its protocol engine: messages leave in the order in which they were queued, events come in
that of the stream.

What the kernel does not take at once is kept and sent by `write_loop`. Nothing here waits for an answer: who
asked what is the session's business.
"""

from __future__ import annotations

import socket
from collections import deque
from contextlib import suppress
from typing import Protocol

import trio

from client._socket import close_all, receive, send
from protocol import Connection, Event
from protocol.limits import (
    MAX_OUTSTANDING,
    MAX_QUEUED,
    MAX_UNREAD_ANSWERS,
    READS_PER_TURN,
    RECEIVE_SIZE,
)


class WireUser(Protocol):
    """Whom a wire tells what happens."""

    def handle(self, event: Event) -> None:
        """Do what an event asks for; its descriptors are the user's."""

    def cannot_send(self, reason: str) -> None:
        """What was queued may not have left; something may still come."""

    def ended(self, reason: str) -> None:
        """Nothing can come any more."""

    def drained(self) -> None:
        """Everything that was queued has left."""


class Wire:
    """Takes the socket over."""

    def __init__(self, sock: socket.socket, connection: Connection, user: WireUser) -> None:
        self.connection = connection
        self.queued = 0
        """Bytes that the kernel has not taken yet."""
        self.room = trio.lowlevel.ParkingLot()
        """Who waits for `queued` to become less; all are woken when it is at most MAX_QUEUED."""
        self._socket = sock
        self._user = user
        self._buffer = bytearray(RECEIVE_SIZE)
        self._outbox: deque[tuple[memoryview, tuple[int, ...], int]] = deque()
        self._answers = self._answer_bytes = 0
        self._writer = trio.lowlevel.ParkingLot()

    @property
    def busy(self) -> bool:
        """Whether something waits for the kernel to take it."""
        return bool(self._outbox)

    # out

    def queue(self, message: bytes, fds: tuple[int, ...] = (), *, answer: bool = False) -> None:
        """Send as much as the kernel takes now and keep the rest; takes the descriptors over. Raises OSError
        if the connection is gone.
        """
        view = memoryview(message)
        answer_size = len(message) if answer else 0
        if not self._outbox:
            try:
                sent = send(self._socket, view, fds)
            except OSError:
                close_all(fds)
                raise
            if sent:
                close_all(fds)
                fds = ()
            if sent == len(view):
                return
            view = view[sent:]
        self._outbox.append((view, fds, answer_size))
        self.queued += len(view)
        if answer:
            self._answers += 1
            self._answer_bytes += answer_size
        self._writer.unpark()

    def may_answer(self) -> bool:
        """Whether the server reads its answers well enough to be given another; asked before each one."""
        return self._answers <= MAX_OUTSTANDING and self._answer_bytes <= MAX_UNREAD_ANSWERS

    async def write_loop(self) -> None:
        """Background task: sends what the kernel did not take at once."""
        while True:
            while not self._outbox:
                await self._writer.park()
            await trio.lowlevel.wait_writable(self._socket)
            try:
                self._write_what_is_taken()
            except OSError as error:
                # the reader sees the end as well, after what the server said before it left
                self._user.cannot_send(gone(error))
                return
            if self.queued <= MAX_QUEUED:
                self.room.unpark_all()

    def _write_what_is_taken(self) -> None:
        while self._outbox:
            view, fds, answer_size = self._outbox[0]
            sent = send(self._socket, view, fds)
            if not sent:
                return
            close_all(fds)
            self.queued -= sent
            if sent < len(view):
                self._outbox[0] = (view[sent:], (), answer_size)
                continue
            self._outbox.popleft()
            if answer_size:
                self._answers -= 1
                self._answer_bytes -= answer_size
        self._user.drained()

    # in

    async def read_loop(self) -> None:
        """Background task: reports what comes; returns when nothing can come any more."""
        while not self.connection.closed:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                self._read_what_is_there()
            except OSError as error:
                self._user.ended(gone(error))
                return

    def _read_what_is_there(self) -> None:
        for _ in range(READS_PER_TURN):
            if self.connection.closed:
                return
            got = receive(self._socket, self._buffer, self.connection.limits.max_msg_fds)
            if got is None:
                return
            size, fds, lost = got
            if size == 0:
                close_all(fds)
                self._user.ended("the server closed the connection")
                return
            with memoryview(self._buffer) as view:
                events = self.connection.receive(view[:size], fds, fds_lost=lost)
            for event in events:
                self._user.handle(event)
            if size < RECEIVE_SIZE and not fds:
                return

    # the end

    def end(self) -> None:
        """Nothing is read any more, and who waits for room is woken."""
        close_all(self.connection.close())
        self.room.unpark_all()

    def hang_up(self) -> None:
        """Let the server see the end; both loops return."""
        self.end()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and what was not sent."""
        self.end()
        for _, fds, _ in self._outbox:
            close_all(fds)
        self._outbox.clear()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


def gone(error: OSError) -> str:
    """The reason of an end, in words."""
    return f"the server is gone: {error.strerror}"
