"""A vfio-user session: many requests under way at once over one socket.

A request is queued, sent as soon as the kernel takes it, and answered whenever the server likes; its task
sleeps meanwhile. Giving up on one (a trio timeout, a cancellation) leaves the session as it was: the
message still goes out whole, its answer is dropped when it comes. Messages leave in the order of the calls,
and a server handles them in that order.

Descriptors given to a request are sent, not kept: they stay the caller's, who may close them when the call
returns or is cancelled.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import outcome
import trio

from client._socket import close_all, receive, send
from client.errors import BadReplyError, ClientError, Disconnected, ServerError
from client.iova import IovaSpace
from client.regions import IrqDetails, RegionDetails
from protocol import (
    BadReply,
    Broken,
    Command,
    Connection,
    ErrorReply,
    Event,
    Refused,
    Reply,
)
from protocol.limits import MAX_OUTSTANDING
from protocol.messages import DeviceInfo, DmaMap, DmaUnmap, Record, RegionAccess, SetIrqs
from protocol.vfio import DmaMapFlags, DmaUnmapFlags, IrqSetFlags

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

RECEIVE_SIZE: Final = 64 << 10
"""Bytes taken from the socket at a time: many small replies, and a large one in few pieces."""

MAX_QUEUED: Final = 1 << 20
"""Bytes that wait for a slow server before callers must wait as well; one request of the largest usual
size.
"""

READS_PER_TURN: Final = 16
"""How often the socket is read before other tasks get their turn, however much the server says."""

READ_WRITE: Final = DmaMapFlags.READ | DmaMapFlags.WRITE


class Session:
    """Made by `client.connect`. `info`, `regions` and `irqs` were asked for when it began."""

    info: DeviceInfo
    regions: tuple[RegionDetails, ...]
    irqs: tuple[IrqDetails, ...]

    def __init__(self, sock: socket.socket, connection: Connection) -> None:
        self.connection = connection
        self.iovas = IovaSpace()
        """Which I/O virtual addresses this session has given out."""
        self._socket = sock
        self._buffer = bytearray(RECEIVE_SIZE)
        self._outbox: deque[tuple[memoryview, tuple[int, ...]]] = deque()
        self._queued = 0
        self._refusals = 0
        self._writer = trio.lowlevel.ParkingLot()
        self._crowd = trio.lowlevel.ParkingLot()
        self._waiting: dict[tuple[int, int], trio.lowlevel.Task] = {}
        self._failure: str | None = None
        self._ended = trio.Event()

    # requests

    async def request(
        self,
        command: Command,
        body: Record | None = None,
        data: ReadableBuffer = b"",
        fds: Sequence[int] = (),
    ) -> Reply:
        """Send a request and wait for its answer; descriptors in it are the caller's.

        Raises ServerError if the server refuses it, BadReplyError if the answer is malformed, Disconnected
        if the session ends first, protocol.LocalProtocolError for a request that must not be sent, and
        OSError for descriptors that cannot be sent.
        Bound the wait with trio.fail_after or move_on_after.
        """
        await self._wait_for_room()
        copies = _copy_all(fds)
        try:
            message_id, message = self.connection.request(command, body, data, copies)
        except BaseException:
            close_all(copies)
            raise
        key = (message_id, int(command))
        self._queue(message, copies)
        self._waiting[key] = trio.lowlevel.current_task()

        def give_up(_: object) -> trio.lowlevel.Abort:
            del self._waiting[key]
            return trio.lowlevel.Abort.SUCCEEDED

        answer: Reply = await trio.lowlevel.wait_task_rescheduled(give_up)
        return answer

    def post(self, command: Command, body: Record | None = None, data: ReadableBuffer = b"") -> None:
        """Send a request that gets no answer, without waiting; what the kernel does not take at once is
        kept, and lost if the session ends first. Raises Disconnected.
        """
        self._check()
        self._queue(self.connection.request(command, body, data, no_reply=True)[1], ())

    async def region_read(self, index: int, offset: int, count: int) -> bytes:
        """`count` bytes of a region by message, in as few messages as the server allows; raises as
        `request` does.
        """
        step = self._max_transfer
        if count <= step:
            return await self._read_once(index, offset, count)
        pieces = [
            await self._read_once(index, at, min(step, offset + count - at))
            for at in range(offset, offset + count, step)
        ]
        return b"".join(pieces)

    async def region_write(self, index: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to a region by message and wait until the device has it; raises as `request` does."""
        step = self._max_transfer
        for at in range(0, len(data), step):
            part = data[at : at + step]
            reply = await self.request(
                Command.REGION_WRITE, RegionAccess(offset + at, index, len(part)), part
            )
            assert isinstance(reply.body, RegionAccess)
            if reply.body.count != len(part):
                raise BadReplyError(reply.command, f"{reply.body.count} of {len(part)} bytes written")

    async def post_write(self, index: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to a region without an answer; waits while a slow server has too much to read, otherwise
        lets other tasks run and goes on. Raises Disconnected.

        Later requests are handled after it. A refusal is not told.
        """
        await trio.lowlevel.checkpoint()
        await self._wait_for_room()
        self.post_write_now(index, offset, data)

    def post_write_now(self, index: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """`post_write` that never waits; for a doorbell, not for bulk."""
        self.post(Command.REGION_WRITE, RegionAccess(offset, index, len(data)), data)

    async def dma_map(
        self, iova: int, length: int, flags: DmaMapFlags = READ_WRITE, fd: int | None = None, offset: int = 0
    ) -> None:
        """Let the device reach `length` bytes at `iova`: those at `offset` of `fd`, or by message where
        there is none.
        """
        body = DmaMap(DmaMap.size, flags, offset, iova, length)
        await self.request(Command.DMA_MAP, body, fds=() if fd is None else (fd,))

    async def dma_unmap(self, iova: int, length: int) -> None:
        """Take a window back; when this returns the device does not touch it any more."""
        await self.request(Command.DMA_UNMAP, DmaUnmap(DmaUnmap.size, DmaUnmapFlags(0), iova, length))

    async def set_irqs(
        self,
        index: int,
        flags: IrqSetFlags,
        start: int = 0,
        count: int = 0,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """SET_IRQS as it is; `client.interrupts` has what drivers want."""
        body = SetIrqs(SetIrqs.size + len(data), flags, index, start, count)
        await self.request(Command.DEVICE_SET_IRQS, body, data, fds)

    async def reset(self) -> None:
        """DEVICE_RESET; may take the device arbitrarily long."""
        await self.request(Command.DEVICE_RESET)

    async def wait_end(self) -> Disconnected:
        """Until the session is over, for whatever reason; what a request would raise then."""
        await self._ended.wait()
        return Disconnected(self._failure)

    @property
    def _max_transfer(self) -> int:
        return max(1, min(self.connection.peer.max_data_xfer_size, self.connection.limits.max_data_xfer_size))

    async def _read_once(self, index: int, offset: int, count: int) -> bytes:
        reply = await self.request(Command.REGION_READ, RegionAccess(offset, index, count))
        if len(reply.data) != count:
            raise BadReplyError(reply.command, f"{len(reply.data)} of {count} bytes")
        return reply.data

    # the socket

    def _check(self) -> None:
        if self._failure is not None:
            raise Disconnected(self._failure)

    async def _wait_for_room(self) -> None:
        self._check()
        while self._queued > MAX_QUEUED or self.connection.outstanding >= MAX_OUTSTANDING:
            await self._crowd.park()
            self._check()

    def _queue(self, message: bytes, fds: tuple[int, ...]) -> None:
        """Send as much as the kernel takes now and keep the rest; takes the descriptors over."""
        view = memoryview(message)
        if not self._outbox:
            try:
                sent = self._send(view, fds)
            except Disconnected:
                close_all(fds)
                raise
            if sent:
                close_all(fds)
                fds = ()
            if sent == len(view):
                return
            view = view[sent:]
        self._outbox.append((view, fds))
        self._queued += len(view)
        self._writer.unpark()

    def _send(self, view: memoryview, fds: Sequence[int]) -> int:
        try:
            return send(self._socket, view, fds)
        except OSError as error:
            # the reader sees the end of the stream as well, after what the server said before it left
            self._failure = self._failure or f"the server is gone: {error.strerror}"
            raise Disconnected(self._failure) from None

    async def write_loop(self) -> None:
        """Background task: sends what the kernel did not take at once."""
        while True:
            while not self._outbox:
                await self._writer.park()
            await trio.lowlevel.wait_writable(self._socket)
            try:
                while self._outbox:
                    view, fds = self._outbox[0]
                    sent = self._send(view, fds)
                    if not sent:
                        break
                    close_all(fds)
                    self._queued -= sent
                    if sent < len(view):
                        self._outbox[0] = (view[sent:], ())
                    else:
                        self._outbox.popleft()
            except Disconnected:
                return
            if not self._outbox:
                self._refusals = 0
            if self._queued <= MAX_QUEUED:
                self._crowd.unpark_all()

    async def read_loop(self) -> None:
        """Background task: hands each answer to the task that waits for it; returns when the session is
        over.
        """
        while not self.connection.closed:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                self._read_what_is_there()
            except OSError as error:
                self._end(f"the server is gone: {error.strerror}")

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
                self._end("the server closed the connection")
                return
            with memoryview(self._buffer) as view:
                events = self.connection.receive(view[:size], fds, fds_lost=lost)
            for event in events:
                self.handle(event)
            if size < RECEIVE_SIZE and not fds:
                return

    def handle(self, event: Event) -> None:
        """Do what one event asks for."""
        match event:
            case Reply():
                self._wake(event.message_id, event.command, outcome.Value(event), event.fds)
            case ErrorReply():
                close_all(event.fds)
                error: ClientError = ServerError(event.command, event.errno)
                self._wake(event.message_id, event.command, outcome.Error(error))
            case BadReply():
                close_all(event.fds)
                error = BadReplyError(event.command, event.reason)
                self._wake(event.message_id, event.command, outcome.Error(error))
            case Broken():
                close_all(event.fds)
                self._end(f"the server breaks the protocol: {event.error}")
            case Refused():
                close_all(event.fds)
                self._refuse(event)
            case _:
                close_all(event.fds)

    def _refuse(self, event: Refused) -> None:
        if self.connection.closed:
            return
        answer = self.connection.error(event, event.errno)
        if answer:
            with suppress(Disconnected):
                self._queue(answer, ())
        if self._outbox:
            self._refusals += 1
            if self._refusals > MAX_OUTSTANDING:
                self._end("the server asks for more and more and reads no answers")

    def _wake(
        self,
        message_id: int,
        command: Command,
        result: outcome.Outcome[Reply],
        fds: Sequence[int] = (),
    ) -> None:
        task = self._waiting.pop((message_id, int(command)), None)
        if task is None:
            close_all(fds)
        else:
            trio.lowlevel.reschedule(task, result)
        self._crowd.unpark()

    def _end(self, reason: str) -> None:
        """The session is over: everyone who waits is told."""
        self._failure = self._failure or reason
        self._ended.set()
        close_all(self.connection.close())
        waiting, self._waiting = self._waiting, {}
        for task in waiting.values():
            trio.lowlevel.reschedule(task, outcome.Error(Disconnected(self._failure)))
        self._crowd.unpark_all()

    def close(self) -> None:
        """Close the socket and everything the session owns; whoever waits gets Disconnected."""
        self._end("the session is closed")
        for _, fds in self._outbox:
            close_all(fds)
        self._outbox.clear()
        for region in getattr(self, "regions", ()):
            region.close()
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()


def _copy_all(fds: Sequence[int]) -> tuple[int, ...]:
    """Copies of the descriptors, all or none: a message may leave after its caller has closed them."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError:
        close_all(copies)
        raise
    return tuple(copies)
