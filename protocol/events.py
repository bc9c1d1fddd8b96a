"""What `Connection.receive` reports, in the order of the byte stream.

Descriptors in an event belong to whoever takes the event: he closes those that nobody else took over. The
engine never closes one.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol._fields import Record
from protocol.capabilities import Capabilities
from protocol.commands import Command
from protocol.errors import RemoteProtocolError
from protocol.messages import Version


@dataclass(slots=True)
class Request:
    """The peer asks for something and the message is well formed: answer with `Connection.reply` or `.error`.

    `body` is the command's record (None for DEVICE_RESET), `data` the bytes after it. `no_reply` says that
    the peer wants no answer; both calls then give b"".
    """

    command: Command
    message_id: int
    no_reply: bool
    body: Record | None
    data: bytes
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The peer asks for something malformed, out of place or unknown; answer with `Connection.error(event,
    event.errno)`. `awaited` is how many bytes of data a peer with PADDED_ERRORS waits for.
    """

    command: int
    message_id: int
    no_reply: bool
    errno: int
    reason: str
    fds: tuple[int, ...] = ()
    awaited: int = 0


@dataclass(frozen=True, slots=True)
class Negotiated:
    """VERSION is agreed on; both ends may send commands now.

    On a server, `reply` must be sent; if `twin` is true, one end of a new socket pair must go with it as its
    only descriptor, and the other end is for `Connection.twin`. On a client `reply` is empty, and `twin_fd`
    is the twin socket among `fds`, if the server made one. `version` is the agreed one, `peer` what the other
    side announced. `fds` came with the message.
    """

    version: Version
    peer: Capabilities
    reply: bytes
    message_id: int
    fds: tuple[int, ...] = ()
    twin: bool = False
    twin_fd: int | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request of ours, known by (message_id, command)."""

    command: Command
    message_id: int
    body: Record | None
    data: bytes
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """The peer refused a request of ours; `errno` is EIO where the peer gave none that Linux knows."""

    command: Command
    message_id: int
    errno: int
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BadReply:
    """The peer answered a request of ours with nonsense: whoever waits for it must be told (EPROTO); the
    stream itself is sound.
    """

    command: Command
    message_id: int
    reason: str
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stray:
    """A reply to a command that we sent with No_reply; some servers send them. To be dropped."""

    command: Command
    message_id: int
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Broken:
    """The end: answer the requests that were reported before it, send `farewell` if it is not empty, close
    the socket. Always the last event of a connection.
    """

    error: RemoteProtocolError
    farewell: bytes
    fds: tuple[int, ...] = ()


Event = Request | Refused | Negotiated | Reply | ErrorReply | BadReply | Stray | Broken
