"""The protocol engine of one connection, without I/O: bytes and descriptors in, events out; requests and
replies in, bytes out.

One engine serves both roles. Its guarantees:

- However the byte stream is cut into pieces, the same events come out. A message is reported when its last
  byte is there.
- Descriptors that come with a piece belong to the last message that begins in it: a unix stream socket ends
  a recvmsg after the segment that carries descriptors, and every peer sends a message in one piece. They
  are never closed here (see `events`).
- What a peer can make the engine keep is one message of at most `max_message_size` bytes, with its
  descriptors.
- Nothing raises because of what a peer sent: it becomes `Refused`, `BadReply` or `Broken`. What was reported
  before Broken can still be answered.
- What a peer does in its own way (see `quirks`) is reported as if it did it by the specification.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from errno import EBUSY, EINVAL, EOPNOTSUPP, EPROTO
from typing import TYPE_CHECKING, Final

from protocol._checks import KEPT_DATA, REPLY_CHECKS, REQUEST_CHECKS
from protocol._dialect import complete_write_reply, from_odd, odd_forms, proof_of_shift, to_odd
from protocol._fields import Record
from protocol._negotiation import (
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    known_errno,
    read_agreement,
    read_proposal,
)
from protocol._payloads import decode, encode, padding, small
from protocol._states import TRANSITIONS, State, Step
from protocol.capabilities import Capabilities, answer, offer, twin_agreed
from protocol.commands import SHAPES, Command, Role, Shape, Tail, command_name
from protocol.errors import LocalProtocolError, RemoteProtocolError
from protocol.events import BadReply, Broken, ErrorReply, Event, Negotiated, Refused, Reply, Request, Stray
from protocol.limits import (
    HEADER_SIZE,
    MAX_INFO_SIZE,
    MAX_MESSAGE_HEAD,
    MAX_OUTSTANDING,
    MAX_VERSION_DATA,
    MAX_WHOLE_MESSAGE,
    SMALL_REPLY,
    Limits,
)
from protocol.messages import TYPE_MASK, DmaAccess, HeaderFlags, MigData, RegionAccess, Version
from protocol.quirks import Overrides, Quirk, detect

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_Header = tuple[int, ...]
_Fds = tuple[int, ...]
_HEADER = struct.Struct("=HHIII")
_NO_HEADER: Final = (0, 0, 0, TYPE_MASK, 0)
_REPLY: Final = int(HeaderFlags.REPLY)
_NO_REPLY: Final = int(HeaderFlags.NO_REPLY)
_ERROR: Final = int(HeaderFlags.ERROR)


class Connection:
    """One end of a vfio-user socket. Public attributes are to be read only.

    `quirks` says by hand what the peer has or has not of `protocol.quirks`; the rest is found out.
    """

    def __init__(self, role: Role, limits: Limits | None = None, quirks: Overrides | None = None) -> None:
        self.role = role
        self.limits = limits or Limits()
        self.quirks: frozenset[Quirk] = frozenset()
        """What the peer is taken to have; found out with VERSION."""
        self.peer = Capabilities()
        """What the other end announced; the spec's defaults before VERSION."""
        self.version: Version | None = None
        """The agreed version, None before."""
        self._overrides = quirks or Overrides()
        self._state = State.START
        self._is_twin = self._has_twin = False
        self._layout_shown = False
        self._partial = bytearray()
        self._partial_fds: tuple[int, ...] = ()
        self._wanted = HEADER_SIZE
        self._excess_fds = False
        self._pending: dict[tuple[int, int], tuple[Record | None, bytes]] = {}
        self._posted: set[int] = set()
        self._next_id = 0
        bulk = MAX_MESSAGE_HEAD + self.limits.max_data_xfer_size
        self._max_ready_size = HEADER_SIZE + max(bulk, MAX_INFO_SIZE)
        self._believe(self._overrides.apply(frozenset()))

    @property
    def ready(self) -> bool:
        """VERSION is agreed on and nothing broke."""
        return self._state is State.READY

    @property
    def closed(self) -> bool:
        """Nothing can be sent or received any more."""
        return self._state in (State.BROKEN, State.CLOSED)

    @property
    def at_boundary(self) -> bool:
        """No message is half received: the next byte begins a header."""
        return not self._partial

    @property
    def outstanding(self) -> int:
        """Requests sent whose answer has not come."""
        return len(self._pending)

    @property
    def max_read(self) -> int:
        """Bytes of data that one request of ours may ask for."""
        return min(self.peer.max_data_xfer_size, self.limits.max_data_xfer_size)

    @property
    def max_write(self) -> int:
        """Bytes of data that one request of ours may carry."""
        if Quirk.WHOLE_BODIES in self.quirks:
            return min(self.max_read, MAX_WHOLE_MESSAGE - HEADER_SIZE - MAX_MESSAGE_HEAD)
        return self.max_read

    @property
    def write_multiple(self) -> bool:
        """Both ends speak REGION_WRITE_MULTI."""
        return self.limits.write_multiple and self.peer.write_multiple

    @property
    def dma_layout_in_doubt(self) -> bool:
        """The peer looks as if it had SHIFTED_DMA, and no DMA_READ reply has shown yet whether it has."""
        return not self._layout_shown and Quirk.SHIFTED_DMA in self.quirks - self._overrides.force

    @property
    def max_message_size(self) -> int:
        """Bytes of the longest message that is read now; it grows once VERSION is agreed on."""
        if self._state is State.READY:
            return self._max_ready_size
        return HEADER_SIZE + Version.size + MAX_VERSION_DATA

    def twin(self) -> Connection:
        """The engine of the twin socket, ready at once: only the server's commands go there.

        Raises LocalProtocolError(EPROTO) if none was agreed on.
        """
        if not self._has_twin or self._state is not State.READY:
            raise LocalProtocolError(EPROTO, "no twin socket is agreed on")
        twin = Connection(self.role, self.limits, self._overrides)
        twin.peer, twin.version = self.peer, self.version
        twin._believe(self.quirks)
        twin._state, twin._is_twin = State.READY, True
        return twin

    def _believe(self, quirks: frozenset[Quirk]) -> None:
        self.quirks = quirks
        self._odd = odd_forms(quirks)

    # receiving

    def receive(
        self, data: ReadableBuffer, fds: Sequence[int] = (), *, fds_lost: bool = False
    ) -> list[Event]:
        """Take what one recvmsg gave and report what it completes.

        `data` is copied where it is kept. `fds_lost` says that the kernel dropped descriptors (MSG_CTRUNC):
        the message that they belong to is refused. Raises LocalProtocolError if the connection is closed or
        broken, and takes nothing then.
        """
        if self._state >= State.BROKEN:
            raise LocalProtocolError(EPROTO, "nothing can be received on a closed connection")
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                return self._keep_fds(tuple(fds), fds_lost)
            data = bytes(self._partial)
            self._partial.clear()
        events: list[Event] = []
        with memoryview(data) as view:
            self._split(view, tuple(fds), fds_lost, events)
        return events

    def close(self) -> tuple[int, ...]:
        """The socket is gone or given up; gives the descriptors of a half received message, for the caller
        to close.
        """
        self._state = TRANSITIONS[self._state, Step.CLOSE]
        fds, self._partial_fds = self._partial_fds, ()
        self._partial.clear()
        self._pending.clear()
        return fds

    def _keep_fds(self, fds: _Fds, lost: bool) -> list[Event]:
        """Descriptors of a half received message; more than it may have are fatal, lest they pile up."""
        self._partial_fds += fds
        self._excess_fds |= lost
        if len(self._partial_fds) <= self.limits.max_msg_fds:
            return []
        reason = f"more than {self.limits.max_msg_fds} descriptors in one message"
        return [self._break(EINVAL, reason, _NO_HEADER, ())]

    def _split(self, view: memoryview, fds: _Fds, lost: bool, events: list[Event]) -> None:
        """Cut the view into messages; `self._partial_fds` belong to the first, `fds` to the last that
        begins here.
        """
        at, end = 0, len(view)
        while end - at >= HEADER_SIZE:
            header = _HEADER.unpack_from(view, at)
            size = header[2]
            kind = header[3] & TYPE_MASK
            if size < HEADER_SIZE or size > self.max_message_size:
                events.append(self._break(EINVAL, f"a message of {size} bytes", header, fds))
                return
            if kind > _REPLY:
                events.append(self._break(EINVAL, f"a message of type {kind}", header, fds))
                return
            if size > end - at:
                self._wanted = size
                break
            first, excess = self._partial_fds, self._excess_fds
            if first:
                self._partial_fds = ()
            self._excess_fds = False
            if at + size == end:
                first, fds = first + fds, ()
                excess, lost = excess or lost, False
            if len(first) > self.limits.max_msg_fds:
                excess = True
            at += HEADER_SIZE
            with view[at : at + size - HEADER_SIZE] as payload:
                if kind:
                    event = self._receive_reply(header, payload, first, excess)
                else:
                    event = self._receive_command(header, payload, first, excess)
            if isinstance(event, Broken) and fds:
                event = Broken(event.error, event.farewell, event.fds + fds)
            events.append(event)
            if self._state is State.BROKEN:
                return
            at += size - HEADER_SIZE
        else:
            self._wanted = HEADER_SIZE
        if at < end or fds:
            self._partial += view[at:end]
            events += self._keep_fds(fds, lost)

    def _receive_command(self, header: _Header, payload: memoryview, fds: _Fds, excess: bool) -> Event:
        message_id, number, _, flags, _ = header
        if self._state is not State.READY:
            return self._receive_version(header, payload, fds)
        no_reply = bool(flags & _NO_REPLY)
        shape = SHAPES.get(number)
        errno, reason = EINVAL, None
        if flags & _ERROR and not payload and self._waits_for(message_id, number):
            return self._receive_reply(header, payload, fds, excess)
        if excess:
            reason = f"{command_name(number)} with more than {self.limits.max_msg_fds} descriptors"
        elif shape is None or shape.sender is self.role or (self._is_twin and shape.sender is Role.CLIENT):
            reason = f"{command_name(number)} is not a request to a {self.role.value}"
        elif number == Command.VERSION:
            reason = "a second VERSION"
        elif flags & _ERROR:
            reason = f"{shape.command.name} with the error flag of a reply"
        elif number == Command.REGION_WRITE_MULTI and not self.write_multiple:
            errno, reason = EOPNOTSUPP, "REGION_WRITE_MULTI was not agreed on"
        else:
            if (number, False) in self._odd:
                payload = from_odd((number, False), payload)
            decoded = decode(shape, shape.request, payload)
            if isinstance(decoded, str):
                reason = decoded
            else:
                body, data = decoded
                most = self.limits.max_data_xfer_size
                if Quirk.SMALL_REPLIES in self.quirks and shape.reply.tail is Tail.DATA:
                    body, most = small(body), min(most, SMALL_REPLY - MAX_MESSAGE_HEAD)
                check = REQUEST_CHECKS.get(number)
                if check is not None:
                    reason = check(body, data, len(fds), most)
                if reason is None:
                    return Request(shape.command, message_id, no_reply, body, data, fds)
        return Refused(number, message_id, no_reply, errno, reason, fds, self._awaited(number, payload))

    def _waits_for(self, message_id: int, number: int) -> bool:
        """A request of ours has that id and command: a command with both can only be its refusal."""
        return (message_id, number) in self._pending or number in self._posted

    def _awaited(self, number: int, payload: memoryview) -> int:
        """Bytes of data that a peer with PADDED_ERRORS waits for after a read that is refused."""
        if Quirk.PADDED_ERRORS not in self.quirks or number != Command.REGION_READ:
            return 0
        if len(payload) < RegionAccess.size:
            return 0
        return min(RegionAccess.decode(payload).count, self.limits.max_data_xfer_size)

    def _receive_version(self, header: _Header, payload: memoryview, fds: _Fds) -> Event:
        message_id, number, _, flags, _ = header
        legal = (self._state, Step.RECEIVE_VERSION) in TRANSITIONS and self.role is Role.SERVER
        if number != Command.VERSION or not legal:
            return self._break(EINVAL, f"{command_name(number)} before VERSION is agreed on", header, fds)
        try:
            proposed, self.peer = read_proposal(payload, flags)
        except RemoteProtocolError as error:
            return self._break(error.errno, error.reason, header, fds)
        self._state = TRANSITIONS[self._state, Step.RECEIVE_VERSION]
        self.version = Version(PROTOCOL_MAJOR, min(proposed.minor, PROTOCOL_MINOR))
        self._believe(self._overrides.apply(detect(self.role, self.peer, proposed)))
        self._has_twin = twin_agreed(self.limits, self.peer)
        content = self.version.encode() + answer(self.limits, self.peer)
        reply = _HEADER.pack(message_id, number, HEADER_SIZE + len(content), _REPLY, 0) + content
        return Negotiated(self.version, self.peer, reply, message_id, fds, twin=self._has_twin)

    def _receive_reply(self, header: _Header, payload: memoryview, fds: _Fds, excess: bool) -> Event:
        message_id, number, _, flags, error = header
        key = (message_id, number)
        if key not in self._pending:
            if number in self._posted:
                return Stray(Command(number), message_id, fds)
            what = f"a reply to {command_name(number)} {message_id} that nobody asked for"
            return self._break(EPROTO, what, header, fds)
        asked, sent = self._pending.pop(key)
        shape = SHAPES[number]
        if self._state is State.OFFERED:
            return self._receive_agreement(header, payload, fds, excess)
        if flags & _ERROR:
            return ErrorReply(shape.command, message_id, known_errno(error), fds)
        if excess:
            what = f"more than {self.limits.max_msg_fds} descriptors"
            return BadReply(shape.command, message_id, what, fds)
        if isinstance(asked, DmaAccess):
            payload = self._settle_dma(number, asked, payload)
        if (number, True) in self._odd:
            payload = from_odd((number, True), payload)
        decoded = decode(shape, shape.reply, payload)
        if isinstance(decoded, str):
            return BadReply(shape.command, message_id, decoded, fds)
        body, data = decoded
        check = REPLY_CHECKS.get(number)
        if check is not None:
            reason = check(asked, sent, body, data)
            if reason is not None:
                return BadReply(shape.command, message_id, reason, fds)
        if isinstance(body, MigData):
            data = data[: body.length]
        return Reply(shape.command, message_id, body, data, fds)

    def _settle_dma(self, number: int, asked: DmaAccess, payload: memoryview) -> memoryview:
        """Believe a reply that proves where this peer has its data, and bear all lengths of the other."""
        if number == Command.DMA_WRITE:
            return complete_write_reply(asked, payload)
        shifted = proof_of_shift(asked, payload)
        self._layout_shown |= shifted is not None
        if shifted is not None and shifted is not (Quirk.SHIFTED_DMA in self.quirks):
            changed = self.quirks | {Quirk.SHIFTED_DMA} if shifted else self.quirks - {Quirk.SHIFTED_DMA}
            self._believe(self._overrides.apply(changed))
        return payload

    def _receive_agreement(self, header: _Header, payload: memoryview, fds: _Fds, excess: bool) -> Event:
        message_id, _, _, flags, error = header
        try:
            nr_fds = 0 if excess else len(fds)
            self.version, self.peer = read_agreement(payload, flags, error, self.limits, nr_fds)
        except RemoteProtocolError as refusal:
            return self._break(refusal.errno, refusal.reason, header, fds)
        self._state = TRANSITIONS[self._state, Step.RECEIVE_AGREEMENT]
        self._believe(self._overrides.apply(detect(self.role, self.peer, self.version)))
        index = self.peer.twin_socket_fd_index if self.peer.twin_socket else None
        self._has_twin = index is not None
        twin_fd = None if index is None else fds[index]
        return Negotiated(self.version, self.peer, b"", message_id, fds, self._has_twin, twin_fd)

    def _break(self, errno: int, reason: str, header: _Header, fds: _Fds) -> Broken:
        """The peer cannot be believed any more. The farewell tells it why, if it sent a command that wants
        an answer.
        """
        self._state = TRANSITIONS[self._state, Step.BREAK]
        self._partial.clear()
        fds = self._partial_fds + fds
        self._partial_fds = ()
        self._pending.clear()
        farewell = b""
        if header[3] & (TYPE_MASK | _NO_REPLY) == 0:
            farewell = _HEADER.pack(header[0], header[1], HEADER_SIZE, _REPLY | _ERROR, errno)
        return Broken(RemoteProtocolError(errno, reason), farewell, fds)

    # sending

    def propose(self) -> bytes:
        """The client's first message, VERSION with this side's limits."""
        if self.role is not Role.CLIENT:
            raise LocalProtocolError(EINVAL, "a server does not propose a version")
        self._step(Step.SEND_VERSION)
        content = Version(PROTOCOL_MAJOR, PROTOCOL_MINOR).encode() + offer(self.limits)
        self._pending[self._next_id, int(Command.VERSION)] = None, b""
        return _HEADER.pack(self._take_id(), Command.VERSION, HEADER_SIZE + len(content), 0, 0) + content

    def request(
        self,
        command: Command,
        body: Record | None = None,
        data: ReadableBuffer = b"",
        fds: Sequence[int] = (),
        *,
        no_reply: bool = False,
    ) -> tuple[int, bytes]:
        """(message id, message) of a request; send it in one call, together with `fds` and with nothing
        after it in that call.

        Raises LocalProtocolError, and changes nothing, for what the peer would have to refuse: a command
        that is not ours to send, or not here (EOPNOTSUPP), a malformed body, more data or descriptors than
        the peer takes (EINVAL), too many requests without an answer (EBUSY), a session that is not ready
        (EPROTO). With `no_reply` there is no answer and the id means nothing.
        """
        shape = SHAPES[command]
        self._check_road(shape)
        content = encode(shape, shape.request, body, data, fds, self.peer.max_msg_fds)
        sent = content[shape.request.size :]
        check = REQUEST_CHECKS.get(command)
        if check is not None:
            most = self.max_read if shape.reply.tail is Tail.DATA else self.max_write
            reason = check(body, sent, len(fds), most)
            if reason is not None:
                raise LocalProtocolError(EINVAL, reason)
        if not no_reply and len(self._pending) >= MAX_OUTSTANDING:
            raise LocalProtocolError(EBUSY, f"{MAX_OUTSTANDING} requests without an answer")
        self._step(Step.SEND_COMMAND)
        while (self._next_id, int(command)) in self._pending:
            self._take_id()
        message_id = self._take_id()
        if no_reply:
            self._posted.add(int(command))
        else:
            self._pending[message_id, int(command)] = body, sent if command in KEPT_DATA else b""
        if (command, False) in self._odd:
            content = to_odd((command, False), content)
        flags = _NO_REPLY if no_reply else 0
        return message_id, _HEADER.pack(message_id, command, HEADER_SIZE + len(content), flags, 0) + content

    def reply(
        self,
        request: Request,
        body: Record | None = None,
        data: ReadableBuffer = b"",
        fds: Sequence[int] = (),
    ) -> bytes:
        """The answer to a request, b"" if it wants none; send it in one call together with `fds`. It may be
        one that was reported before Broken.

        Raises LocalProtocolError(EINVAL) if the body is not what the command answers with or the peer does
        not take so many descriptors.
        """
        if self._state is not State.READY:
            self._step(Step.SEND_REPLY)
        if request.no_reply:
            return b""
        shape = SHAPES[request.command]
        content = encode(shape, shape.reply, body, data, fds, self.peer.max_msg_fds)
        if (request.command, True) in self._odd:
            content = to_odd((request.command, True), content)
        size = HEADER_SIZE + len(content)
        return _HEADER.pack(request.message_id, request.command, size, _REPLY, 0) + content

    def error(self, request: Request | Refused, errno: int) -> bytes:
        """The header that refuses a request, b"" if it wants no answer. It may be one that was reported
        before Broken.
        """
        if self._state is not State.READY:
            self._step(Step.SEND_REPLY)
        if request.no_reply:
            return b""
        content = padding(request) if Quirk.PADDED_ERRORS in self.quirks else b""
        size = HEADER_SIZE + len(content)
        return _HEADER.pack(request.message_id, request.command, size, _REPLY | _ERROR, errno) + content

    def _check_road(self, shape: Shape) -> None:
        """The command is one that this end sends, and on this socket."""
        command = shape.command
        if shape.sender is not self.role or command == Command.VERSION:
            raise LocalProtocolError(EOPNOTSUPP, f"{command.name} cannot be sent by a {self.role.value}")
        if self._is_twin and self.role is Role.CLIENT:
            raise LocalProtocolError(EOPNOTSUPP, f"{command.name} does not go over the twin socket")
        if self._has_twin and self.role is Role.SERVER:
            raise LocalProtocolError(EOPNOTSUPP, f"{command.name} goes over the twin socket")
        if command == Command.REGION_WRITE_MULTI and not self.write_multiple:
            raise LocalProtocolError(EOPNOTSUPP, f"{command.name} was not agreed on")

    def _step(self, step: Step) -> None:
        state = TRANSITIONS.get((self._state, step))
        if state is None:
            raise LocalProtocolError(EPROTO, f"{step.name} is not allowed in state {self._state.name}")
        self._state = state

    def _take_id(self) -> int:
        taken = self._next_id
        self._next_id = (taken + 1) & 0xFFFF
        return taken
