"""Descriptors that come with messages."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable

from protocol.limits import MAX_FDS_PER_MESSAGE

__all__ = ["close_all", "receive"]

_ROOM = socket.CMSG_SPACE(MAX_FDS_PER_MESSAGE * array.array("i").itemsize)


def receive(connection: socket.socket, size: int) -> tuple[bytes, tuple[int, ...], bool]:
    """At most ``size`` bytes, the descriptors that came along, and whether the kernel dropped some.

    The descriptors are close-on-exec and the caller's. Raises what `socket.socket.recvmsg` raises.
    """
    data, control, flags, _ = connection.recvmsg(size, _ROOM, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, rights in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(rights[: len(rights) - len(rights) % fds.itemsize])
    return data, tuple(fds), bool(flags & socket.MSG_CTRUNC)


def close_all(fds: Iterable[int]) -> None:
    """Close each of them."""
    for fd in fds:
        os.close(fd)
