"""A client that breaks the rules on demand, with a deadline on every wait.

It answers what a server asks for meanwhile (DMA_READ and DMA_WRITE, on the main socket and on a twin), so
that a server may ask at any time. Whatever it makes or is given, it closes at its end.
"""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
import termios
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from typing import Final

import trio

from conformance._memory import Memory, Window, answer_dma
from conformance._messages import (
    HEADER,
    JSON,
    MAX_REPLY_SIZE,
    Message,
    announced,
    kind_of,
    message,
    version,
)
from conformance.checks import Failed, NotApplicable, Silent, expect
from protocol import Command, command_name
from protocol.limits import MAX_FDS_PER_MESSAGE
from protocol.messages import DeviceInfo, DmaMap, DmaUnmap, HeaderFlags, Record
from protocol.vfio import DmaMapFlags, DmaUnmapFlags

CAPABILITIES: Final[JSON] = {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20}
"""What the peer proposes unless a check wants otherwise: the two that every client mentions."""

SETTLE_S: Final = 0.02
"""Seconds that a piece of a message may lie in the socket: some servers take none but whole headers."""

Payload = bytes | Record

_ONE: Final = DmaUnmapFlags(0)


class HungUp(Failed):
    """The server closed the connection where it should have gone on."""


class Wire:
    """One socket of a session. Several tasks may send, one at a time receives."""

    def __init__(self, connected: socket.socket, patience: float, own: Callable[[int], None]) -> None:
        self.socket = connected
        self._patience = patience
        self._own = own
        self._sending = trio.Lock()

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put bytes on the wire, descriptors with the first of them; `Failed` if the server takes none."""
        with trio.move_on_after(self._patience) as late:
            async with self._sending:
                await self._send(data, fds)
        if late.cancelled_caught:
            raise Failed("a server that reads", f"{len(data)} bytes not taken within {self._patience:g} s")

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        rest = memoryview(data)
        while rest:
            await trio.lowlevel.wait_writable(self.socket)
            try:
                sent = self.socket.sendmsg([rest], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
            except OSError as error:
                raise HungUp("a server that listens", f"a closed connection ({error.strerror})") from None
            rest, rights = rest[sent:], []

    async def receive(self, wanted: str) -> Message | None:
        """The next message, or None where the server hung up; `Failed` if nothing comes in time."""
        with trio.move_on_after(self._patience) as late:
            return await self._receive()
        assert late.cancelled_caught
        raise Silent(wanted, f"no answer within {self._patience:g} s")

    async def _receive(self) -> Message | None:
        data, fds, size = bytearray(), array.array("i"), HEADER.size
        while len(data) < size:
            await trio.lowlevel.wait_readable(self.socket)
            try:
                piece, rights, _, _ = self.socket.recvmsg(
                    size - len(data), socket.CMSG_SPACE(4 * MAX_FDS_PER_MESSAGE)
                )
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ECONNRESET:
                    raise
                piece, rights = b"", []
            for _, _, sent in rights:
                fds.frombytes(sent)
            if not piece:
                expect(not data, "a whole message", f"{len(data)} bytes of {size}, then the end")
                return None
            data += piece
            if len(data) == HEADER.size:
                size = HEADER.unpack(data)[2]
                if not HEADER.size <= size <= MAX_REPLY_SIZE:
                    raise Failed("a message size that counts the header", f"a size of {size}")
        for fd in fds:
            self._own(fd)
        message_id, command, _, flags, error_number = HEADER.unpack_from(data)
        return Message(message_id, command, flags, error_number, bytes(data[HEADER.size :]), tuple(fds))


class Peer:
    """A connection to the server under test. Nothing is sent that a check did not ask for."""

    def __init__(self, connected: socket.socket, patience: float) -> None:
        self.patience = patience
        self.announced: JSON = {}
        """What the server announced in VERSION."""
        self.windows: list[Window] = []
        """What the server may reach by DMA_READ and DMA_WRITE."""
        self.answers = True
        """What the server asks for is answered."""
        self.asked: list[tuple[str, Message]] = []
        """What the server asked for, each with the socket it came by: "main" or "twin"."""
        self._things = ExitStack()
        self._things.callback(connected.close)
        self._fds: set[int] = set()
        self._things.callback(self._close_all)
        self._main = Wire(connected, patience, self.own)
        self._twin: Wire | None = None
        self._next_id = 0x100

    def close(self) -> None:
        """Hang up, and give everything back."""
        self._things.close()

    def hang_up(self) -> None:
        """Close the connection; memory and descriptors stay to be looked at."""
        self._main.socket.close()

    def own(self, fd: int) -> None:
        """Close this descriptor in the end."""
        self._fds.add(fd)

    def let_go(self, fd: int) -> None:
        """Close this descriptor now."""
        self._fds.remove(fd)
        os.close(fd)

    def _close_all(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def eventfd(self) -> int:
        """A new eventfd."""
        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.own(fd)
        return fd

    def memory(self, length: int) -> Memory:
        """Memory that can be shared, all zeros."""
        return self._things.enter_context(Memory(length))

    # messages

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put bytes on the wire, whatever they are."""
        await self._main.send(data, fds)

    async def settle(self) -> None:
        """Give the server time to take what was sent, so that the next piece comes by itself."""
        with trio.move_on_after(SETTLE_S):
            while fcntl.ioctl(self._main.socket, termios.TIOCOUTQ, bytes(4)) != bytes(4):  # noqa: ASYNC110
                await trio.sleep(0)  # noqa: ASYNC115

    async def receive(self, wanted: str = "a message") -> Message:
        """The next reply; what the server asks for on the way is answered. `HungUp` at the end."""
        found = await self.next(wanted)
        if found is None:
            raise HungUp(wanted, "a closed connection")
        return found

    async def next(self, wanted: str = "a message or the end") -> Message | None:
        """The next reply, or None: the server hung up."""
        while True:
            found = await self._main.receive(wanted)
            if found is None or found.is_reply:
                return found
            await self._serve(self._main, "main", found)

    async def listen(self, wanted: str) -> None:
        """Wait until the server asked for something and got its answer, by whichever socket."""
        before = len(self.asked)
        wires = [("main", self._main)] + ([("twin", self._twin)] if self._twin else [])

        async def one(name: str, wire: Wire, done: trio.CancelScope) -> None:
            await trio.lowlevel.wait_readable(wire.socket)
            found = await wire.receive(wanted)
            if found is None:
                raise HungUp(wanted, f"the end of the {name} socket")
            await self._serve(wire, name, found)
            done.cancel()

        with trio.move_on_after(self.patience):
            async with trio.open_nursery() as nursery:
                for name, wire in wires:
                    nursery.start_soon(one, name, wire, nursery.cancel_scope)
        if len(self.asked) == before:
            raise Silent(wanted, f"nothing within {self.patience:g} s")

    async def _serve(self, wire: Wire, name: str, question: Message) -> None:
        self.asked.append((name, question))
        if question.flags & 0xF or question.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise Failed("no request but DMA_READ and DMA_WRITE", str(question))
        if self.answers:
            await wire.send(answer_dma(self.windows, question))

    def new_id(self) -> int:
        """A message id that this session did not use lately."""
        self._next_id = (self._next_id + 1) & 0xFFFF
        return self._next_id

    async def ask(
        self, command: int, payload: Payload = b"", fds: Sequence[int] = (), *, flags: int = 0, error: int = 0
    ) -> Message:
        """A request and its answer, whether granted or refused."""
        number = self.new_id()
        await self.send(message(command, _bytes(payload), message_id=number, flags=flags, error=error), fds)
        return await self.reply_to(command, number)

    async def reply_to(self, command: int, number: int) -> Message:
        """The next message, which must answer this request."""
        wanted = f"a reply to {command_name(command)} with id {number:#x}"
        reply = await self.receive(wanted)
        expect((reply.message_id, reply.command) == (number, command), wanted, _told_apart(reply))
        return reply

    async def granted(
        self, command: int, payload: Payload = b"", fds: Sequence[int] = (), *, what: str = ""
    ) -> Message:
        """The answer to a request that must be granted."""
        reply = await self.ask(command, payload, fds)
        expect(not reply.refused, f"that {command_name(command)}{_about(what)} is granted", reply)
        return reply

    async def refused(
        self,
        command: int,
        payload: Payload = b"",
        fds: Sequence[int] = (),
        *,
        what: str,
        errno: int | None = None,
    ) -> Message:
        """The answer to a request that must be refused, with this errno if one is demanded."""
        reply = await self.ask(command, payload, fds)
        wanted = f"a refusal of {command_name(command)}{_about(what)}"
        expect(reply.refused, wanted, reply)
        if errno is not None:
            expect(reply.error == errno, f"{wanted} with {os.strerror(errno)!r} ({errno})", reply)
        return reply

    async def turned_down(self, data: bytes, fds: Sequence[int] = (), *, what: str) -> None:
        """Bytes that must not be taken for good: a refusal or a closed connection answers them."""
        wanted = f"a refusal of {what}, or the end"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_what_goes, data, fds)
            reply = await self.next(wanted)
            nursery.cancel_scope.cancel()
        expect(reply is None or reply.refused, wanted, reply)

    async def _send_what_goes(self, data: bytes, fds: Sequence[int]) -> None:
        with suppress(Failed):
            await self.send(data, fds)

    async def quiet(self, what: str) -> None:
        """Nothing is on its way: the next message answers the request that is made now."""
        number = self.new_id()
        await self.send(message(Command.DEVICE_GET_INFO, DeviceInfo(16).encode(), message_id=number))
        reply = await self.receive("a reply to DEVICE_GET_INFO")
        same = (reply.message_id, reply.command) == (number, Command.DEVICE_GET_INFO)
        expect(same, f"no answer to {what}", _told_apart(reply))

    # beginnings

    async def propose(self, capabilities: JSON | None = CAPABILITIES, *, minor: int = 2) -> Message:
        """VERSION and its answer, whatever that is."""
        return await self.ask(Command.VERSION, version(capabilities, minor=minor))

    async def negotiate(self, capabilities: JSON | None = CAPABILITIES, *, minor: int = 2) -> Message:
        """Agree on a version; a twin socket that the server sets up is listened to."""
        reply = await self.propose(capabilities, minor=minor)
        expect(not reply.refused and len(reply.payload) >= 4, "that VERSION is agreed to", reply)
        self.announced = announced(reply.payload)
        twin = self.announced.get("twin_socket")
        if isinstance(twin, dict) and twin.get("supported") is True:
            self._twin = self._take_twin(twin.get("fd_index"), reply.fds)
        return reply

    def _take_twin(self, index: object, fds: Sequence[int]) -> Wire:
        valid = isinstance(index, int) and 0 <= index < len(fds)
        expect(valid, f"an fd_index among {len(fds)} descriptors", index)
        assert isinstance(index, int)
        kind = kind_of(fds[index])
        expect(kind.startswith("socket:"), "a socket at twin_socket.fd_index", kind)
        twin = self._things.enter_context(socket.socket(fileno=os.dup(fds[index])))
        twin.setblocking(False)
        return Wire(twin, self.patience, self.own)

    @property
    def has_twin(self) -> bool:
        """A twin socket was set up."""
        return self._twin is not None

    def limit(self, name: str, default: int) -> int:
        """A number that the server announced, or what the specification says of one that did not."""
        value = self.announced.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise NotApplicable(f"the server announces {name} as {value!r}")
        return value

    # DMA windows

    async def map(
        self,
        address: int,
        memory: Memory,
        *,
        length: int | None = None,
        offset: int = 0,
        flags: DmaMapFlags = DmaMapFlags.READ | DmaMapFlags.WRITE,
        shared: bool = True,
    ) -> Message:
        """Ask for a window over memory, with its descriptor (`shared`) or by message only."""
        size = memory.length - offset if length is None else length
        body = DmaMap(DmaMap.size, flags, offset if shared else 0, address, size)
        reply = await self.ask(Command.DMA_MAP, body, (memory.fd,) if shared else ())
        if not reply.refused:
            self.windows.append(Window(address, size, memory, offset, flags))
        return reply

    async def mapped(self, address: int, memory: Memory, *, what: str = "", shared: bool = True) -> None:
        """A window over memory, which must be granted."""
        reply = await self.map(address, memory, shared=shared)
        expect(not reply.refused, f"that DMA_MAP{_about(what)} is granted", reply)

    async def unmap(self, address: int, length: int, flags: DmaUnmapFlags = _ONE) -> Message:
        """Ask for a window to be taken back."""
        reply = await self.ask(Command.DMA_UNMAP, DmaUnmap(DmaUnmap.size, flags, address, length))
        if not reply.refused:
            inside = range(address, address + length)
            self.windows = [window for window in self.windows if window.address not in inside]
        return reply

    async def unmapped(self, address: int, length: int, *, what: str = "") -> Message:
        """A window is taken back, which must be granted."""
        reply = await self.unmap(address, length)
        expect(not reply.refused, f"that DMA_UNMAP{_about(what)} is granted", reply)
        return reply


async def pipelined(peer: Peer, requests: Iterable[tuple[int, Payload]]) -> list[Message]:
    """Send all the requests, reading answers at the same time; the answers in the order they came."""
    numbered = [(peer.new_id(), command, _bytes(payload)) for command, payload in requests]
    replies: list[Message] = []

    async def send() -> None:
        for number, command, payload in numbered:
            await peer.send(message(command, payload, message_id=number))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        for number, command, _ in numbered:
            replies.append(await peer.reply_to(command, number))
    return replies


def _bytes(payload: Payload) -> bytes:
    return payload.encode() if isinstance(payload, Record) else payload


def _about(what: str) -> str:
    return f" ({what})" if what else ""


def _told_apart(reply: Message) -> str:
    flags = HeaderFlags(reply.flags)
    return f"{reply} with id {reply.message_id:#x} and flags {flags!r}"
