"""What a server offers: its regions with their descriptors, and its interrupts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from client.errors import BadReplyError
from protocol import Command, RemoteProtocolError, Reply
from protocol.limits import MAX_INFO_SIZE
from protocol.messages import RegionInfo
from protocol.region_info import Capability, mappable_areas, parse_capabilities_chain
from protocol.vfio import IrqInfoFlags, RegionFlags


@dataclass(slots=True)
class RegionDetails:
    """A region as the server describes it.

    `size` in bytes, 0 if absent; `areas` are the (offset, length) that may be mapped through `fd`, at
    `mmap_offset` plus the area's offset. The descriptor is the session's, -1 if there is none.
    """

    index: int
    size: int
    flags: RegionFlags
    mmap_offset: int
    areas: tuple[tuple[int, int], ...]
    capabilities: tuple[Capability, ...]
    fd: int = -1

    def close(self) -> None:
        """Close the descriptor; mappings made of it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(frozen=True, slots=True)
class IrqDetails:
    """A kind of interrupt as the server describes it; `count` vectors, 0 if absent."""

    index: int
    count: int
    flags: IrqInfoFlags


def needed_argsz(reply: Reply, asked: int) -> int | None:
    """The argsz to ask again with, None if the reply was whole; raises BadReplyError for a size that no
    region needs.
    """
    assert isinstance(reply.body, RegionInfo)
    needed = reply.body.argsz
    if needed <= asked:
        return None
    if needed > MAX_INFO_SIZE:
        raise BadReplyError(reply.command, f"{needed} bytes of region information")
    return needed


def region_from_reply(index: int, reply: Reply) -> RegionDetails:
    """Decode a whole reply; takes its descriptor over, unless it raises BadReplyError."""
    info = reply.body
    assert isinstance(info, RegionInfo)
    try:
        capabilities = parse_capabilities_chain(info, reply.data)
        areas = mappable_areas(info, capabilities)
    except RemoteProtocolError as error:
        raise BadReplyError(Command.DEVICE_GET_REGION_INFO, error.reason) from None
    if info.index != index:
        raise BadReplyError(Command.DEVICE_GET_REGION_INFO, f"region {info.index} instead of {index}")
    if len(reply.fds) > 1:
        raise BadReplyError(Command.DEVICE_GET_REGION_INFO, f"{len(reply.fds)} descriptors for one region")
    fd = reply.fds[0] if reply.fds else -1
    return RegionDetails(
        index, info.length, info.flags, info.offset, areas if reply.fds else (), capabilities, fd
    )
