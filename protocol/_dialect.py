"""The wire effects of quirks: what a peer's own form of a message is, and what it means.

A payload is what follows the header. Whoever calls this knows which quirks his peer has.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from protocol.commands import Command
from protocol.messages import DmaAccess, DmaUnmap
from protocol.quirks import Quirk

_EARLY: Final = 4
"""Bytes by which QEMU's data stand too early: it has a count of 32 bits."""

_HEAD: Final = DmaAccess.size - _EARLY

_FLAGS: Final = struct.Struct("=I")
_FLAGS_AT: Final = next(field.offset for field in DmaUnmap.layout if field.name == "flags")

Form = tuple[int, bool]
"""(command, whether it is the reply)."""

_SHIFTED: Final = frozenset({(int(Command.DMA_WRITE), False), (int(Command.DMA_READ), True)})
_UNMAP: Final = frozenset({(int(Command.DMA_UNMAP), False), (int(Command.DMA_UNMAP), True)})
_BARE: Final = (int(Command.DMA_WRITE), True)


def odd_forms(quirks: frozenset[Quirk]) -> frozenset[Form]:
    """The messages that peers with these quirks have in a form of their own."""
    forms: frozenset[Form] = frozenset()
    if Quirk.SHIFTED_DMA in quirks:
        forms |= _SHIFTED
    if Quirk.UNMAP_FLAGS_ONE_UP in quirks:
        forms |= _UNMAP
    if Quirk.BARE_DMA_WRITE_REPLY in quirks:
        forms |= {_BARE}
    return forms


def to_odd(form: Form, content: bytes) -> bytes:
    """A sound payload in the peer's form, which is one of its `odd_forms`."""
    if form in _SHIFTED:
        return content[:_HEAD] + content[DmaAccess.size :] + bytes(_EARLY)
    if form in _UNMAP:
        return _with_flags(content, lambda flags: flags << 1)
    return b""


def from_odd(form: Form, payload: memoryview) -> memoryview:
    """The sound form of a payload in the peer's; what is too short stays as it is."""
    if form in _SHIFTED and len(payload) >= DmaAccess.size:
        return memoryview(bytes(payload[:_HEAD]) + bytes(_EARLY) + bytes(payload[_HEAD:-_EARLY]))
    if form in _UNMAP and len(payload) >= DmaUnmap.size:
        return memoryview(_with_flags(bytes(payload), lambda flags: flags >> 1))
    return payload


def proof_of_shift(asked: DmaAccess, payload: memoryview) -> bool | None:
    """Whether a reply to DMA_READ is certainly in QEMU's form (True) or certainly not (False).

    In QEMU's form the first data bytes lie where the count's upper half would be, and the last four bytes
    are zero. If both places are zero the reply has the same length and the same beginning in either form.
    """
    if len(payload) != DmaAccess.size + asked.count or payload[:_HEAD] != asked.encode()[:_HEAD]:
        return None
    if any(payload[_HEAD : DmaAccess.size]):
        return True
    return False if any(payload[-_EARLY:]) and asked.count else None


def complete_write_reply(asked: DmaAccess, payload: memoryview) -> memoryview:
    """A reply to DMA_WRITE of 16 bytes, whichever of the three lengths it came in: none (QEMU), 12 (the
    spec's own table) or 16.
    """
    if len(payload) == 0:
        return memoryview(asked.encode())
    if len(payload) == _HEAD:
        return memoryview(bytes(payload) + bytes(_EARLY))
    return payload


def _with_flags(content: bytes, moved: Callable[[int], int]) -> bytes:
    (flags,) = _FLAGS.unpack_from(content, _FLAGS_AT)
    return content[:_FLAGS_AT] + _FLAGS.pack(moved(flags) & 0xFFFF_FFFF) + content[_FLAGS_AT + _FLAGS.size :]
