"""Requests that the library must not see: answered here, because it would crash on them or take them wrong.

Whoever holds the client's socket looks at a message before the library does. What is refused here carries
the errno that the specification or the kernel gives; each rule names what the library would have done.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EEXIST, EINVAL, ENOTTY, EOPNOTSUPP
from typing import Final

from device.dma import PAGE_SIZE
from protocol import Command
from protocol.errors import RemoteProtocolError
from protocol.messages import DeviceFeature, DmaMap, DmaUnmap, Header, HeaderFlags, SetIrqs
from protocol.vfio import (
    IRQ_SET_ACTION,
    IRQ_SET_DATA,
    DmaMapFlags,
    DmaUnmapFlags,
    Feature,
    IrqSetFlags,
)
from server.libvfio_user._windows import Windows

__all__ = ["LONGEST_LOOK", "MAX_MESSAGE_SIZE", "Screen", "parse_header", "refusal"]

LONGEST_LOOK: Final = Header.size + DmaMap.size
"""Bytes of a message that any rule looks at."""

MAX_MESSAGE_SIZE: Final = Header.size + 16 + (1 << 20)
"""SERVER_MAX_MSG_SIZE of upstream's private.h: the library refuses more and misreads what follows."""

_TYPE_MASK: Final = 0xF
_LARGEST_U32: Final = 0xFFFF_FFFF
_END_OF_U64: Final = 1 << 64
_IRQ_FLAGS: Final = int(IRQ_SET_DATA | IRQ_SET_ACTION)
_LOGGING: Final = frozenset({Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT})


def parse_header(look: bytes) -> Header:
    """The header that begins a message; `RemoteProtocolError` where the library would lose its place in the
    stream: sizes that it refuses without taking the body, and replies that nobody asked for.
    """
    header = Header.decode(look)
    if not Header.size <= header.message_size <= MAX_MESSAGE_SIZE:
        raise RemoteProtocolError(EINVAL, f"a message of {header.message_size} bytes")
    if int(header.flags) & _TYPE_MASK:
        raise RemoteProtocolError(
            EINVAL, f"message type {int(header.flags) & _TYPE_MASK} where a request should be"
        )
    return header


class Screen:
    """The rules, for a client that has mapped ``windows``."""

    def __init__(self, windows: Windows) -> None:
        self._windows = windows

    def verdict(self, header: Header, look: bytes) -> int:
        """The errno that refuses the message that begins with ``look``, or 0: the library may have it."""
        rule = _RULES.get(header.command)
        return rule(self, look) if rule is not None else 0

    def _dma_map(self, look: bytes) -> int:
        """Windows that the card refuses, which the library does not ask: it says yes to all of these. Of one
        that is there already it forgets to close the second descriptor.
        """
        if len(look) < Header.size + DmaMap.size:
            return EINVAL
        body = DmaMap.decode(look, Header.size)
        wraps = body.address + body.length > _END_OF_U64
        unaligned = (body.address | body.length | body.offset) % PAGE_SIZE
        if not body.length or wraps or unaligned or not body.flags & (DmaMapFlags.READ | DmaMapFlags.WRITE):
            return EINVAL
        return EEXIST if self._windows.overlap(body.address, body.length) else 0

    def _dma_unmap(self, look: bytes) -> int:
        """A dirty bitmap would come back clean (`Limit.DMA_LOGGING`)."""
        if len(look) < Header.size + DmaUnmap.size:
            return EINVAL
        flags = DmaUnmap.decode(look, Header.size).flags
        return EOPNOTSUPP if flags & DmaUnmapFlags.GET_DIRTY_BITMAP else 0

    def _set_irqs(self, look: bytes) -> int:
        """A range that wraps ends the library of 2022; all of them overlook flags that nobody has defined,
        and forget an eventfd to unmask by (`Limit.RESAMPLE`).
        """
        if len(look) < Header.size + SetIrqs.size:
            return EINVAL
        body = SetIrqs.decode(look, Header.size)
        if body.start + body.count > _LARGEST_U32 or int(body.flags) & ~_IRQ_FLAGS:
            return EINVAL
        masks = body.flags & (IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK)
        return ENOTTY if masks and body.flags & IrqSetFlags.DATA_EVENTFD else 0

    def _device_feature(self, look: bytes) -> int:
        """A log of dirty pages would be clean (`Limit.DMA_LOGGING`)."""
        if len(look) < Header.size + DeviceFeature.size:
            return EINVAL
        return EOPNOTSUPP if DeviceFeature.decode(look, Header.size).feature in _LOGGING else 0


_RULES: Final[dict[int, Callable[[Screen, bytes], int]]] = {
    Command.DMA_MAP: Screen._dma_map,
    Command.DMA_UNMAP: Screen._dma_unmap,
    Command.DEVICE_SET_IRQS: Screen._set_irqs,
    Command.DEVICE_FEATURE: Screen._device_feature,
}


def refusal(header: Header, errno: int) -> bytes:
    """The error reply; empty when the client wants none."""
    if header.flags & HeaderFlags.NO_REPLY:
        return b""
    return Header(
        header.message_id, header.command, Header.size, HeaderFlags.REPLY | HeaderFlags.ERROR, errno
    ).encode()
