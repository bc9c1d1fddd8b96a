"""How long and how much the server bears with a client, each limit with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["MAX_FDS_PER_MESSAGE", "RECEIVE_SIZE", "SessionLimits"]

# Room for as many descriptors as the kernel lets one sendmsg carry (SCM_MAX_FD, include/net/scm.h): with
# less, it would drop some silently, and a DMA window without its descriptor means something else than one
# with.
MAX_FDS_PER_MESSAGE: Final = 253

# Bytes taken from the socket at once: several hundred register accesses, or a good part of a large
# transfer.
RECEIVE_SIZE: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one client may cost; times in seconds."""

    version_deadline: float = 10.0
    """A client that connects and does not say VERSION blocks the card for others; QEMU says it at once."""

    send_deadline: float = 30.0
    """A client that takes none of its replies for so long is dropped. Only one that sends many requests
    without reading gets here: the replies to one fit into the socket's buffer.
    """

    tellings: int = 20
    """Log entries of refused requests: a client must not fill a disk with them."""

    messages_per_turn: int = 64
    """Messages answered before other cards in the same thread get their turn."""
