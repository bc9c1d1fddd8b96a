"""The header before each frame (virtio 1.3, 5.1.6): what was left to the other side, 12 bytes in
VERSION_1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Self

from client.errors import ClientError

SIZE: Final = 12
_LAYOUT = struct.Struct("<BBHHHHH")


class HeaderFlags(IntFlag):
    """VIRTIO_NET_HDR_F_*."""

    NEEDS_CSUM = 1
    DATA_VALID = 2
    RSC_INFO = 4


class Gso(IntEnum):
    """VIRTIO_NET_HDR_GSO_*; ECN may be or'ed to a type."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5
    ECN = 0x80


@dataclass(frozen=True, slots=True)
class NetHeader:
    """`flags` of HeaderFlags, `gso_type` of Gso, lengths and offsets in bytes; `num_buffers` is the
    device's, over how many buffers a received frame lies.
    """

    flags: int = 0
    gso_type: int = Gso.NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def encode(self) -> bytes:
        """The header's bytes."""
        return _LAYOUT.pack(
            self.flags,
            self.gso_type,
            self.hdr_len,
            self.gso_size,
            self.csum_start,
            self.csum_offset,
            self.num_buffers,
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The header that these bytes begin with; raises ClientError if they are too few."""
        if len(data) < SIZE:
            raise ClientError(f"a net header of {len(data)} bytes")
        return cls(*_LAYOUT.unpack_from(data))
