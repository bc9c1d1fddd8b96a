"""What every port is: the end of the card's cable."""

from __future__ import annotations

import enum
from collections.abc import Callable

import trio


class PortError(ValueError):
    """A port that cannot be had: one line that says why and what to do."""


class Framing(enum.Enum):
    """How frames lie on a port's file descriptor."""

    PACKETS = "packets"         # each read and each write is a frame behind `vnet_header_size` bytes
    STREAM = "stream"           # a 4-byte big-endian length, then the frame
    LOOPBACK = "loopback"       # no descriptor: what is sent comes back


class Offload(enum.IntFlag):
    """Work on a frame that may be left to the other side of the cable, both ways."""

    CSUM = 1
    TSO4 = 2
    TSO6 = 4
    ECN = 8


class Port:
    """A port that is open; the data path alone reads and writes `fd`, which does not block.

    When `fd` or `link_up` changes, the port calls `on_change` on trio's thread.
    """

    kind = ""
    framing = Framing.PACKETS
    vnet_header_size = 0
    offloads = Offload(0)
    mtu: int | None = None

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.fd = -1
        self.link_up = True
        self.on_change: Callable[[], None] = lambda: None

    def set_offloads(self, accepted: Offload) -> None:
        """The driver can receive frames that need this work; the port must not give it others."""

    def peer_lost(self) -> None:
        """The data path met the end of `fd`: the cable is out until the port finds another peer."""
        self.link_up = False
        self.on_change()

    async def run(self) -> None:
        """The port's background work; ends by cancellation."""
        await trio.sleep_forever()

    def close(self) -> None:
        """Let go of everything the port holds."""
