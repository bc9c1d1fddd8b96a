"""The writes of a REGION_WRITE_MULTI, both ways (spec, "VFIO_USER_REGION_WRITE_MULTI")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from errno import EINVAL
from typing import Final

from protocol.errors import RemoteProtocolError
from protocol.limits import ADDRESS_SPACE, MAX_WRITE_SIZE, MAX_WRITES_PER_MESSAGE
from protocol.messages import WriteMulti, WriteMultiEntry

Write = tuple[int, int, bytes]
"""(region, offset in it, bytes)."""

_ENTRY: Final = struct.Struct("=QII8s")


def pack_writes(writes: Sequence[Write]) -> bytes:
    """What follows WriteMulti(len(writes)). Raises ValueError for more writes than a message may have, and
    for one that is not 1 to 8 bytes long.
    """
    if len(writes) > MAX_WRITES_PER_MESSAGE:
        raise ValueError(f"{len(writes)} writes in a message, more than {MAX_WRITES_PER_MESSAGE}")
    for region, offset, data in writes:
        if not 1 <= len(data) <= MAX_WRITE_SIZE:
            raise ValueError(f"a write of {len(data)} bytes to region {region} at {offset:#x}")
    return b"".join(
        WriteMultiEntry(offset, region, len(data), bytes(data).ljust(MAX_WRITE_SIZE, b"\0")).encode()
        for region, offset, data in writes
    )


def parse_writes(body: WriteMulti, data: bytes) -> tuple[Write, ...]:
    """The writes in the order in which they are to be done; `data` is what follows the record.

    Raises RemoteProtocolError(EINVAL, not fatal) if they are too many, are not as many as the record says,
    or one of them is not 1 to 8 bytes long or wraps.
    """
    if body.wr_cnt > MAX_WRITES_PER_MESSAGE:
        raise _malformed(f"{body.wr_cnt} writes, more than {MAX_WRITES_PER_MESSAGE}")
    if len(data) != body.wr_cnt * WriteMultiEntry.size:
        raise _malformed(f"{body.wr_cnt} writes in {len(data)} bytes")
    writes = []
    for offset, region, count, content in _ENTRY.iter_unpack(data):
        if not 1 <= count <= MAX_WRITE_SIZE or count > ADDRESS_SPACE - offset:
            raise _malformed(f"a write of {count} bytes at {offset:#x}")
        writes.append((region, offset, content[:count]))
    return tuple(writes)


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(EINVAL, f"REGION_WRITE_MULTI with {what}", fatal=False)
