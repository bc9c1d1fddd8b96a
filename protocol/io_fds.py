"""The reply to DEVICE_GET_REGION_IO_FDS with its sub-regions, both ways (spec,
"VFIO_USER_DEVICE_GET_REGION_IO_FDS").
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from errno import EPROTO
from typing import Final

from protocol.errors import RemoteProtocolError
from protocol.limits import ADDRESS_SPACE, MAX_IO_FDS
from protocol.messages import IoEventFd, IoRegionFd, RegionIoFds
from protocol.vfio import IoFdType

IoFd = IoEventFd | IoRegionFd

_LONG_ENTRY: Final = 48
"""Bytes of libvfio-user's entries since 2022: a shadow's offset stands before the datamatch."""
_DATAMATCH: Final = struct.Struct("=Q")


def io_fds_reply(argsz: int, index: int, entries: Sequence[IoFd]) -> tuple[RegionIoFds, bytes]:
    """The record and the data of a reply to a request that allows `argsz` bytes.

    If the entries do not fit, the reply is the record alone (its descriptors stay at home, too), and its
    argsz says how much to ask for next time. Raises ValueError for more than MAX_IO_FDS.
    """
    if len(entries) > MAX_IO_FDS:
        raise ValueError(f"{len(entries)} sub-regions, more than {MAX_IO_FDS}")
    content = b"".join(entry.encode() for entry in entries)
    needed = RegionIoFds.size + len(content)
    record = RegionIoFds(needed, 0, index, len(entries))
    return record, content if needed <= argsz else b""


def parse_io_fds(body: RegionIoFds, data: bytes, nr_fds: int) -> tuple[IoFd, ...]:
    """The sub-regions in a reply that came with `nr_fds` descriptors; `data` is what follows the record.

    Nothing if the reply says that it needs more room: then `body.argsz` is more than came. Entries may be
    longer than those we know. Raises RemoteProtocolError(EPROTO, not fatal) for too many of them, for an
    entry that is cut short, wraps, or has a descriptor that did not come or a type that is not in the spec.
    """
    if body.count > MAX_IO_FDS:
        raise _malformed(f"{body.count} sub-regions, more than {MAX_IO_FDS}")
    if body.count == 0 or (not data and body.argsz > RegionIoFds.size):
        return ()
    step, rest = divmod(len(data), body.count)
    if rest or step < IoEventFd.size:
        raise _malformed(f"{body.count} sub-regions in {len(data)} bytes")
    return tuple(_entry(data[at : at + step], nr_fds) for at in range(0, len(data), step))


def _entry(data: bytes, nr_fds: int) -> IoFd:
    entry = IoEventFd.decode(data)
    if entry.length > ADDRESS_SPACE - entry.offset:
        raise _malformed(f"sub-region {entry.offset:#x}+{entry.length:#x} wraps")
    if entry.fd_index >= nr_fds:
        raise _malformed(f"descriptor {entry.fd_index} of {nr_fds}")
    if entry.type == IoFdType.IOREGIONFD:
        return IoRegionFd.decode(data)
    if entry.type != IoFdType.IOEVENTFD:
        raise _malformed(f"a sub-region of type {entry.type}")
    if len(data) == _LONG_ENTRY:
        (datamatch,) = _DATAMATCH.unpack_from(data, _LONG_ENTRY - _DATAMATCH.size)
        return replace(entry, padding=0, datamatch=datamatch)
    return entry


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(EPROTO, f"malformed GET_REGION_IO_FDS: {what}", fatal=False)
