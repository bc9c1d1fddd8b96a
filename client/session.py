"""A vfio-user session: many requests under way at once over one socket.

A request is queued, sent as soon as the kernel takes it, and answered whenever the server likes; its task
sleeps meanwhile. Giving up on one (a trio timeout, a cancellation) leaves the session as it was: the
message still goes out whole, its answer is dropped when it comes. Messages leave in the order of the calls,
and a server handles them in that order. What the server asks for, between its answers or on a socket of its
own, is answered at once.

Descriptors given to a request are sent, not kept: they stay the caller's, who may close them when the call
returns or is cancelled.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import outcome
import trio

from client._answers import Twin, answer
from client._socket import close_all
from client._wire import Wire, gone
from client.decoding import MemoryDecoding
from client.errors import BadReplyError, ClientError, Disconnected, ServerError
from client.io_fds import IoFds, ask_io_fds
from client.iova import IovaSpace
from client.regions import IrqDetails, RegionDetails
from client.trapping import Trapping
from client.windows import Window, Windows
from protocol import (
    BadReply,
    Broken,
    Command,
    Connection,
    ErrorReply,
    Event,
    LocalProtocolError,
    Refused,
    Reply,
    Request,
)
from protocol.commands import SHAPES, may_carry_fds
from protocol.limits import (
    MAX_OUTSTANDING,
    MAX_QUEUED,
    MAX_WRITE_SIZE,
    MAX_WRITES_PER_MESSAGE,
)
from protocol.messages import (
    DeviceFeature,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    Record,
    RegionAccess,
    SetIrqs,
    WriteMulti,
)
from protocol.vfio import (
    DmaMapFlags,
    DmaUnmapFlags,
    Feature,
    FeatureFlags,
    IrqSetFlags,
    RegionFlags,
    RegionIndex,
)
from protocol.write_multi import pack_writes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

READ_WRITE: Final = DmaMapFlags.READ | DmaMapFlags.WRITE


class Session:
    """Made by `client.connect`. `info`, `regions` and `irqs` were asked for when it began."""

    info: DeviceInfo
    regions: tuple[RegionDetails, ...]
    irqs: tuple[IrqDetails, ...]

    def __init__(
        self, sock: socket.socket, connection: Connection, twin: socket.socket | None = None
    ) -> None:
        self.connection = connection
        self.iovas = IovaSpace()
        """Which I/O virtual addresses this session has given out."""
        self.windows = Windows()
        """What the server may reach by DMA_READ and DMA_WRITE."""
        self.trapping = Trapping()
        """Whether BARs may be accessed without messages, and who is told of those."""
        self.decoding = MemoryDecoding(self)
        """Whether the device answers at its BARs, and who must let go of them before it stops to."""
        self.wires = [Wire(sock, connection, self)]
        """The session's socket, and the one for the server's commands if there is one."""
        self._wire = self.wires[0]
        if twin is not None:
            self.wires.append(Twin(twin, connection.twin(), self.windows, self._end).wire)
        self._waiting: dict[tuple[int, int], trio.lowlevel.Task] = {}
        self._gathered: list[tuple[int, int, bytes]] = []
        self._failure: str | None = None
        self._ended = trio.Event()

    # requests

    async def request(
        self,
        command: Command,
        body: Record | None = None,
        data: ReadableBuffer = b"",
        fds: Sequence[int] = (),
        *,
        urgent: bool = False,
    ) -> Reply:
        """Send a request and wait for its answer; descriptors in it are the caller's. An `urgent` one, which
        must be small, leaves however much waits for a slow server, in its turn.

        Raises ServerError if the server refuses it, BadReplyError if the answer is malformed, Disconnected
        if the session ends first, protocol.LocalProtocolError for a request that must not be sent, and
        OSError for descriptors that cannot be sent.
        Bound the wait with trio.fail_after or move_on_after.
        """
        await self._wait_for_room(urgent=urgent)
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
        step = self.max_read
        if count <= step:
            return await self._read_once(index, offset, count)
        pieces = [
            await self._read_once(index, at, min(step, offset + count - at))
            for at in range(offset, offset + count, step)
        ]
        return b"".join(pieces)

    async def region_write(self, index: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write to a region by message and wait until the device has it; raises as `request` does.

        A write to configuration space that takes the BARs away leaves when nobody uses them any more.
        """
        if index == RegionIndex.CONFIG:
            data = bytes(data)
            write = partial(self._write_all, index, offset, data)
            await self.decoding.around_write(offset, data, write, whole=len(data) <= self.max_write)
        else:
            await self._write_all(index, offset, data)

    async def _write_all(self, index: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        step = self.max_write
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
        """`post_write` that never waits; for a doorbell, not for bulk.

        While a slow server lets messages wait here, small writes are gathered into REGION_WRITE_MULTI if it
        understands that; their order among all messages stays that of the calls.

        Raises ClientError for a write to configuration space that switches BARs which are in use: those who
        use them would have to be waited for.
        """
        self._check()
        if index == RegionIndex.CONFIG:
            self.decoding.check_posted(offset, bytes(data))
        if not self._may_gather(index, offset, len(data)):
            self.post(Command.REGION_WRITE, RegionAccess(offset, index, len(data)), data)
            return
        self._gathered.append((index, offset, bytes(data)))
        if len(self._gathered) == MAX_WRITES_PER_MESSAGE:
            self._send_gathered()

    def _may_gather(self, index: int, offset: int, size: int) -> bool:
        """A write that the server would refuse goes alone: those after it in a message might be dropped."""
        if not self._wire.busy or not self.connection.write_multiple or not 0 < size <= MAX_WRITE_SIZE:
            return False
        region = self.regions[index] if 0 <= index < len(self.regions) else None
        return region is not None and RegionFlags.WRITE in region.flags and 0 <= offset <= region.size - size

    async def io_fds(self, index: int) -> IoFds:
        """The descriptors that stand for writes to parts of a region; to be closed by the caller.

        Raises ServerError if the server has no such thing, BadReplyError for parts outside the region.
        """
        return await ask_io_fds(self, index)

    @property
    def dma_page_size(self) -> int:
        """Bytes that the server's DMA windows are multiples of, and aligned to; raises ClientError if it
        supports no size at all.
        """
        pages = self.connection.peer.pgsizes
        if not pages:
            raise ClientError("the server supports no page size for DMA")
        return pages & -pages

    async def dma_map(
        self,
        iova: int,
        length: int,
        flags: DmaMapFlags = READ_WRITE,
        fd: int | None = None,
        offset: int = 0,
        *,
        view: memoryview | None = None,
    ) -> None:
        """Let the device reach `length` bytes at `iova`: those at `offset` of `fd`, or by message where
        there is none.

        `view` are the same bytes here, lent until `dma_unmap`; without it messages are answered with
        EFAULT. Raises ClientError, and sends nothing, for a window that the server said it would not take
        (max_dma_maps, pgsizes). A window whose mapping is given up by a cancellation counts until
        `dma_unmap`: the server may have it.
        """
        page = self.dma_page_size
        if iova % page or length % page:
            raise ClientError(f"DMA window {iova:#x}+{length:#x}: the server's pages are of {page:#x} bytes")
        if len(self.windows) >= self.connection.peer.max_dma_maps:
            raise ClientError(f"the server takes {self.connection.peer.max_dma_maps} DMA windows at a time")
        self.windows.add(Window(iova, length, flags, view))
        body = DmaMap(DmaMap.size, flags, offset, iova, length)
        try:
            await self.request(Command.DMA_MAP, body, fds=() if fd is None else (fd,))
        except (ServerError, LocalProtocolError, OSError):
            self.windows.remove(iova, length)
            raise

    async def dma_unmap(self, iova: int, length: int) -> None:
        """Take a window back; when this returns the device does not touch it any more.

        One that the server refuses to let go stays reachable by message too; one whose unmapping is given up
        by a cancellation does not.
        """
        await self.unmap(DmaUnmap(DmaUnmap.size, DmaUnmapFlags(0), iova, length))

    async def unmap(self, body: DmaUnmap, data: bytes = b"") -> Reply:
        """DMA_UNMAP as it is; `client.dirty` has the kind with a bitmap."""
        try:
            reply = await self.request(Command.DMA_UNMAP, body, data)
        except (ServerError, LocalProtocolError):
            raise
        except BaseException:
            self.windows.remove(body.address, body.length)
            raise
        self.windows.remove(body.address, body.length)
        return reply

    async def feature_probe(self, feature: Feature, methods: FeatureFlags = FeatureFlags.GET) -> bool:
        """Whether the device has a feature, with all of these methods (GET, SET, both)."""
        try:
            await self._feature(feature, FeatureFlags.PROBE | methods, b"", 0)
        except ServerError:
            return False
        return True

    async def feature_get(self, feature: Feature, data: bytes = b"", *, room: int) -> bytes:
        """A feature's data, of at most `room` bytes; `data` goes along where the feature is asked about
        something. Raises as `request` does.
        """
        return await self._feature(feature, FeatureFlags.GET, data, room)

    async def feature_set(self, feature: Feature, data: bytes = b"") -> bytes:
        """Set a feature's data; what the device made of it. Raises as `request` does."""
        return await self._feature(feature, FeatureFlags.SET, data, len(data))

    async def _feature(self, feature: Feature, flags: FeatureFlags, data: bytes, room: int) -> bytes:
        body = DeviceFeature(DeviceFeature.size + room, FeatureFlags(flags | feature))
        reply = await self.request(Command.DEVICE_FEATURE, body, data)
        close_all(reply.fds)
        if len(reply.data) > room:
            raise BadReplyError(reply.command, f"{len(reply.data)} bytes of {feature.name}, {room} asked for")
        return reply.data

    async def set_irqs(
        self,
        index: int,
        flags: IrqSetFlags,
        start: int = 0,
        count: int = 0,
        data: bytes = b"",
        fds: Sequence[int] = (),
    ) -> None:
        """SET_IRQS as it is, urgent: nothing stays masked because UNMASK was given up before it left.
        `client.interrupts` has what drivers want.
        """
        body = SetIrqs(SetIrqs.size + len(data), flags, index, start, count)
        await self.request(Command.DEVICE_SET_IRQS, body, data, fds, urgent=True)

    async def reset(self) -> None:
        """DEVICE_RESET, which leaves when nobody uses the BARs; may take the device arbitrarily long."""
        await self.decoding.around_reset(partial(self.request, Command.DEVICE_RESET))

    async def wait_end(self) -> Disconnected:
        """Until the session is over, for whatever reason; what a request would raise then."""
        await self._ended.wait()
        return Disconnected(self._failure)

    @property
    def max_read(self) -> int:
        """Bytes that one message may bring."""
        return max(1, self.connection.max_read)

    @property
    def max_write(self) -> int:
        """Bytes that one message may take along."""
        return max(1, self.connection.max_write)

    async def _read_once(self, index: int, offset: int, count: int) -> bytes:
        reply = await self.request(Command.REGION_READ, RegionAccess(offset, index, count))
        if len(reply.data) != count:
            raise BadReplyError(reply.command, f"{len(reply.data)} of {count} bytes")
        return reply.data

    # the sockets

    def _check(self) -> None:
        if self._failure is not None:
            raise Disconnected(self._failure)

    async def _wait_for_room(self, *, urgent: bool = False) -> None:
        """The number of requests without an answer is limited for urgent ones as well."""
        self._check()
        while (
            self._wire.queued > MAX_QUEUED and not urgent
        ) or self.connection.outstanding >= MAX_OUTSTANDING:
            await self._wire.room.park()
            self._check()

    def _queue(self, message: bytes, fds: tuple[int, ...]) -> None:
        """Send as much as the kernel takes now and keep the rest; takes the descriptors over."""
        try:
            self._send_gathered()
        except Disconnected:
            close_all(fds)
            raise
        self._queue_next(message, fds)

    def _send_gathered(self) -> None:
        writes, self._gathered = self._gathered, []
        if len(writes) > 1:
            body, data = WriteMulti(len(writes)), pack_writes(writes)
            message = self.connection.request(Command.REGION_WRITE_MULTI, body, data, no_reply=True)[1]
            self._queue_next(message, ())
        elif writes:
            ((index, offset, data),) = writes
            access = RegionAccess(offset, index, len(data))
            self._queue_next(
                self.connection.request(Command.REGION_WRITE, access, data, no_reply=True)[1], ()
            )

    def _queue_next(self, message: bytes, fds: tuple[int, ...]) -> None:
        try:
            self._wire.queue(message, fds)
        except OSError as error:
            self.cannot_send(gone(error))
            raise Disconnected(self._failure) from None

    def handle(self, event: Event) -> None:
        """Do what one event asks for."""
        match event:
            case Reply() if event.fds and not may_carry_fds(SHAPES[event.command].reply, event.body):
                error: ClientError = BadReplyError(event.command, f"{len(event.fds)} descriptors come along")
                self._wake(event.message_id, event.command, outcome.Error(error))
            case Reply():
                self._wake(event.message_id, event.command, outcome.Value(event), event.fds)
                return
            case ErrorReply():
                error = ServerError(event.command, event.errno)
                self._wake(event.message_id, event.command, outcome.Error(error))
            case BadReply():
                error = BadReplyError(event.command, event.reason)
                self._wake(event.message_id, event.command, outcome.Error(error))
            case Broken():
                self._end(f"the server breaks the protocol: {event.error}")
            case Request() | Refused():
                reason = answer(self._wire, self.windows, event)
                if reason is not None:
                    self._end(reason)
        close_all(event.fds)

    def cannot_send(self, reason: str) -> None:
        """Nothing more can be asked; the reader sees the end as well, after what the server said before."""
        self._failure = self._failure or reason
        self._wire.room.unpark_all()

    def ended(self, reason: str) -> None:
        """The server is gone."""
        self._end(reason)

    def drained(self) -> None:
        """The kernel took everything: what was gathered meanwhile follows."""
        with suppress(Disconnected):  # whoever asks next is told
            self._send_gathered()

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
        self._wire.room.unpark()

    def _end(self, reason: str) -> None:
        """The session is over: everyone who waits is told."""
        self._failure = self._failure or reason
        self._gathered.clear()
        self._ended.set()
        for wire in self.wires:
            wire.end()
        waiting, self._waiting = self._waiting, {}
        for task in waiting.values():
            trio.lowlevel.reschedule(task, outcome.Error(Disconnected(self._failure)))
        self.trapping.end()
        self.decoding.end()

    def hang_up(self, reason: str) -> None:
        """End the session from this side, now; the server sees it, and has to let go of everything."""
        self._end(reason)
        for wire in self.wires:
            wire.hang_up()

    def close(self) -> None:
        """Close the sockets and everything the session owns; whoever waits gets Disconnected."""
        self._end("the session is closed")
        for wire in self.wires:
            wire.close()
        for region in getattr(self, "regions", ()):
            region.close()


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
