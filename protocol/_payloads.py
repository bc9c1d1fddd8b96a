"""A message's payload to and from its record and the bytes after it, by the command's row in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from errno import EINVAL
from typing import TYPE_CHECKING

from protocol._fields import Record
from protocol.commands import SHAPES, Command, Part, Shape, Tail, may_carry_fds
from protocol.errors import LocalProtocolError
from protocol.events import Refused, Request
from protocol.limits import SMALL_REPLY
from protocol.messages import RegionAccess

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


def encode(
    shape: Shape, part: Part, body: Record | None, data: ReadableBuffer, fds: Sequence[int], max_fds: int
) -> bytes:
    """One direction of a command as bytes. Raises LocalProtocolError(EINVAL) if the body is not this
    command's, a value does not fit, there is data where none may be, or more than `max_fds` descriptors.
    """
    name = shape.command.name
    if type(body) is not (part.record or type(None)):
        wanted = part.record.__name__ if part.record else "nothing"
        raise LocalProtocolError(EINVAL, f"{name} takes {wanted}, not {body!r}")
    most = max_fds if may_carry_fds(part, body) else 0
    if len(fds) > most:
        raise LocalProtocolError(EINVAL, f"{name} with {len(fds)} descriptors, {most} at most")
    try:
        content = body.encode() + data if body is not None else bytes(data)
    except ValueError as error:
        raise LocalProtocolError(EINVAL, str(error)) from None
    if part.tail is not Tail.DATA and len(content) > part.size:
        raise LocalProtocolError(EINVAL, f"{name} carries no data")
    return content


def decode(shape: Shape, part: Part, payload: memoryview) -> tuple[Record | None, bytes] | str:
    """A message's record and data, or why it is malformed."""
    length = len(payload)
    if part.record is not None and length == part.size:
        return part.record.decode(payload), b""
    if length < part.size:
        return f"{shape.command.name} of {length} bytes, not {part.size}"
    body = part.record.decode(payload) if part.record is not None else None
    if part.tail is Tail.DATA:
        return body, bytes(payload[part.size :])
    if part.tail is Tail.IGNORED or length == part.size:
        return body, b""
    return f"{shape.command.name} of {length} bytes, not {part.size}"


def small(body: Record | None) -> Record | None:
    """A request that allows no more than a small reply."""
    if body is not None and getattr(body, "argsz", 0) > SMALL_REPLY:
        return replace(body, argsz=SMALL_REPLY)  # type: ignore[type-var]
    return body


def padding(request: Request | Refused) -> bytes:
    """What a peer with PADDED_ERRORS waits for after the header."""
    shape = SHAPES.get(request.command)
    if shape is None:
        return b""
    awaited = 0
    if isinstance(request, Refused):
        awaited = request.awaited
    elif request.command is Command.REGION_READ and isinstance(request.body, RegionAccess):
        awaited = request.body.count
    return bytes(shape.reply.size) + b"\xff" * awaited
