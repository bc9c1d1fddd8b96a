"""Messages as a check sees them: made without a look at what is legal, taken apart without trust.

Layouts are those of `protocol.messages`; framing is done here, because an engine that keeps the rules cannot
break them.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from conformance.checks import Failed
from protocol import command_name
from protocol.messages import HeaderFlags, Record

HEADER: Final = struct.Struct("=HHIII")

MAX_REPLY_SIZE: Final = 80 << 20
"""Bytes of a message that is believed: above the largest transfer that a known peer agrees to (64 MiB)."""

JSON = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it came; descriptors stay the peer's, which closes them at its end."""

    message_id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: tuple[int, ...] = ()

    @property
    def is_reply(self) -> bool:
        """Of type reply: an answer, whatever the other flags say."""
        return self.flags & 0xF == HeaderFlags.REPLY

    @property
    def refused(self) -> bool:
        """An error reply."""
        return self.is_reply and bool(self.flags & HeaderFlags.ERROR)

    def __str__(self) -> str:
        name = command_name(self.command)
        if self.refused:
            return f"a refusal of {name} with {errno_name(self.error)}"
        kind = "a reply to" if self.is_reply else "the request" if self.flags & 0xF == 0 else "a message of"
        carried = f" and {len(self.fds)} descriptors" if self.fds else ""
        return f"{kind} {name} with {len(self.payload)} bytes{carried}"


def errno_name(number: int) -> str:
    """EINVAL, or "errno 4711"."""
    return errno.errorcode.get(number, f"errno {number}")


def message(
    command: int,
    payload: bytes = b"",
    *,
    message_id: int = 1,
    flags: int = 0,
    error: int = 0,
    size: int | None = None,
) -> bytes:
    """A message's bytes; `size` may lie."""
    told = HEADER.size + len(payload) if size is None else size
    return HEADER.pack(message_id, command, told, flags, error) + payload


def version(capabilities: JSON | None, *, major: int = 0, minor: int = 2) -> bytes:
    """The payload of a VERSION; None: no JSON at all."""
    numbers = struct.pack("=HH", major, minor)
    if capabilities is None:
        return numbers
    return numbers + json.dumps({"capabilities": capabilities}).encode() + b"\0"


def announced(payload: bytes) -> JSON:
    """The capabilities in a VERSION's payload; `Failed` where they are malformed."""
    text = payload[4:]
    if not text:
        return {}
    if not text.endswith(b"\0"):
        raise Failed("version data that end with a NUL", repr(text[-16:]))
    try:
        document = json.loads(text.rstrip(b"\0").decode("utf-8"))
    except ValueError as error:
        raise Failed("version data in JSON", f"{text[:60]!r} ({error})") from None
    capabilities = document.get("capabilities", {}) if isinstance(document, dict) else None
    if not isinstance(capabilities, dict):
        raise Failed("an object of capabilities", repr(document))
    return capabilities


def split(reply: Message, record: type[Record]) -> tuple[Any, bytes]:
    """A reply's record and what follows it; `Failed` where it is too short."""
    if len(reply.payload) < record.size:
        raise Failed(f"at least {record.size} bytes of {record.__name__}", str(reply))
    return record.decode(reply.payload), reply.payload[record.size :]


def kind_of(fd: int) -> str:
    """What a descriptor is, as /proc says it: `anon_inode:[eventfd]`, `socket:[4711]`, a path."""
    return os.fspath(Path(f"/proc/self/fd/{fd}").readlink())
