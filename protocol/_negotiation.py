"""What VERSION must be like in either direction (spec, "VFIO_USER_VERSION"); all that is wrong with it ends
the session before it begins.
"""

from __future__ import annotations

from errno import EINVAL, EIO, EPROTO
from typing import Final

from protocol.capabilities import Capabilities, parse_capabilities
from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_ERRNO, Limits
from protocol.messages import HeaderFlags, Version

PROTOCOL_MAJOR: Final = 0
PROTOCOL_MINOR: Final = 2
"""What a client proposes and the most a server agrees to; a lower minor is agreed to as well (0.2 is
libvfio-user's since 2023).
"""

_REFUSED: Final = int(HeaderFlags.ERROR)
_UNFIT: Final = int(HeaderFlags.ERROR | HeaderFlags.NO_REPLY)


def read_proposal(payload: memoryview, flags: int) -> tuple[Version, Capabilities]:
    """What a client proposes; raises RemoteProtocolError(EINVAL) for what cannot be agreed to."""
    if flags & _UNFIT:
        raise RemoteProtocolError(EINVAL, f"VERSION with flags {flags:#x}")
    if len(payload) < Version.size:
        raise RemoteProtocolError(EINVAL, f"VERSION of {len(payload)} bytes")
    proposed = Version.decode(payload)
    if proposed.major != PROTOCOL_MAJOR:
        what = f"version {proposed.major}.{proposed.minor} is proposed, not {PROTOCOL_MAJOR}.x"
        raise RemoteProtocolError(EINVAL, what)
    return proposed, parse_capabilities(bytes(payload[Version.size :]))


def read_agreement(
    payload: memoryview, flags: int, error: int, limits: Limits, nr_fds: int
) -> tuple[Version, Capabilities]:
    """What a server agrees to, in a reply with `nr_fds` descriptors; raises RemoteProtocolError with the
    server's own errno, or EPROTO for an answer to something that was not proposed with `limits`.
    """
    if flags & _REFUSED:
        raise RemoteProtocolError(known_errno(error), "the server refuses VERSION")
    if len(payload) < Version.size:
        raise RemoteProtocolError(EPROTO, f"VERSION answered with {len(payload)} bytes")
    agreed = Version.decode(payload)
    if agreed.major != PROTOCOL_MAJOR or agreed.minor > PROTOCOL_MINOR:
        what = f"version {PROTOCOL_MAJOR}.{PROTOCOL_MINOR} answered with {agreed.major}.{agreed.minor}"
        raise RemoteProtocolError(EPROTO, what)
    try:
        peer = parse_capabilities(bytes(payload[Version.size :]))
    except RemoteProtocolError as refusal:
        raise RemoteProtocolError(EPROTO, refusal.reason) from None
    if peer.twin_socket:
        if not limits.twin_socket:
            raise RemoteProtocolError(EPROTO, "the server sends a twin socket that nobody asked for")
        index = peer.twin_socket_fd_index
        if index is None or index >= nr_fds:
            raise RemoteProtocolError(EPROTO, f"the twin socket is descriptor {index} of {nr_fds}")
    return agreed, peer


def known_errno(number: int) -> int:
    """The errno of an error reply, EIO where the peer gives none that Linux knows."""
    return number if 0 < number <= MAX_ERRNO else EIO
