"""A network device's configuration (virtio 1.3, 5.1.4), as far as its driver reads it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, Self

from client.virtio.transport import VirtioPci

CONFIG_SIZE: Final = 12
"""Bytes of the device configuration up to the MTU."""

LINK_UP: Final = 1
ANNOUNCE: Final = 2
"""Bits of the configuration's status."""

_LAYOUT: Final = struct.Struct("<6sHHH")


@dataclass(frozen=True, slots=True)
class NetConfig:
    """Which of the fields mean something, the features tell."""

    mac: bytes
    status: int
    mtu: int

    @property
    def link_up(self) -> bool:
        """Whether the cable is in."""
        return bool(self.status & LINK_UP)

    @property
    def announce(self) -> bool:
        """Whether the device asks the driver to make itself known to the network."""
        return bool(self.status & ANNOUNCE)

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Fields that are not there are zero."""
        mac, status, _, mtu = _LAYOUT.unpack(data[:CONFIG_SIZE].ljust(CONFIG_SIZE, b"\0"))
        return cls(mac, status, mtu)


async def read_net_config(transport: VirtioPci) -> NetConfig:
    """As the device shows it now."""
    return NetConfig.decode(await transport.device_config(CONFIG_SIZE))
