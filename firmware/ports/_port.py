"""What every port is: the far end of the card's cable."""

from __future__ import annotations

import enum
from collections.abc import Callable

import trio

__all__ = ["MAX_FRAME", "MIN_FRAME", "Framing", "Offload", "Port", "PortError"]

MIN_FRAME = 14  # bytes: an Ethernet header; what is shorter has no addresses
MAX_FRAME = 65535 + 18  # bytes: the largest IP packet behind an Ethernet header with a VLAN tag


class PortError(ValueError):
    """A port that cannot be had: one line that says why and what to do."""


class Framing(enum.Enum):
    """How frames lie on a port's file descriptor."""

    PACKETS = "packets"  # each read and each write is one frame, behind `vnet_header_size` bytes of header
    STREAM = "stream"  # a 4-byte big-endian length, then the frame
    LOOPBACK = "loopback"  # no descriptor: what is sent comes back


class Offload(enum.IntFlag):
    """Work on a frame that may be left to the other side of the cable, both ways."""

    CSUM = 1
    TSO4 = 2
    TSO6 = 4
    ECN = 8


class Port:
    """An open port. The data path alone reads and writes `fd`, which does not block; the port owns it.

    Everything here is called on one thread, trio's once there is one. When `fd` or `link_up` has changed,
    the port calls `on_change`. A descriptor that is lost is closed only after `on_change` has returned, so
    that whoever takes it from another thread there never sees its number used again.
    """

    kind = ""
    framing = Framing.PACKETS
    vnet_header_size = 0
    """Bytes of struct virtio_net_hdr_v1 before each frame on `fd`: 12 or 0."""
    offloads = Offload(0)
    """What the port takes undone from the card, and may leave undone when the driver accepts it."""
    mtu: int | None = None
    """Bytes, where the port has an MTU of its own."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.fd = -1
        self.link_up = True
        self.on_change: Callable[[], None] = lambda: None

    def set_offloads(self, accepted: Offload) -> None:
        """The driver accepts frames that lack this work, and no others.

        Any combination is taken, the impossible ones too; raises nothing.
        """

    def peer_lost(self) -> None:
        """The data path met the end of `fd`, an error or nonsense: the cable is out until `run` mends it.

        Idempotent.
        """
        if self.fd < 0 and not self.link_up:
            return
        self.fd = -1
        self.link_up = False
        self.on_change()
        self._hang_up()

    def _hang_up(self) -> None:
        """Close what `fd` was."""

    async def run(self) -> None:
        """The port's background work, once: until cancelled, or until there is nothing left to do."""
        await trio.sleep_forever()

    def close(self) -> None:
        """Let go of everything the port holds, once `run` has ended. Idempotent."""
