"""Bytes with descriptors over a unix socket; nothing here knows the protocol.

Nothing here waits either, even where the other end holds the same open file and takes its O_NONBLOCK away.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterable, Sequence
from typing import Final

_SEND: Final = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
_RECEIVE: Final = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
_FD_SIZE: Final = array.array("i").itemsize


def send(sock: socket.socket, data: bytes | memoryview, fds: Sequence[int]) -> int:
    """How many bytes the kernel took, 0 if it takes none now; the descriptors went with the first.

    Raises OSError if the connection is gone.
    """
    try:
        if not fds:
            return sock.send(data, _SEND)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
        return sock.sendmsg([data], rights, _SEND)
    except BlockingIOError:
        return 0


def receive(sock: socket.socket, buffer: bytearray, max_fds: int) -> tuple[int, tuple[int, ...], bool] | None:
    """(bytes put into the buffer, descriptors, whether some were dropped); None if nothing is there, 0
    bytes at the end.

    The descriptors are close-on-exec and the caller's. Raises OSError if the connection is gone.
    """
    try:
        size, control, flags, _ = sock.recvmsg_into([buffer], socket.CMSG_SPACE(max_fds * _FD_SIZE), _RECEIVE)
    except BlockingIOError:
        return None
    if not control:
        return size, (), bool(flags & socket.MSG_CTRUNC)
    fds = array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % _FD_SIZE])
    return size, tuple(fds), bool(flags & socket.MSG_CTRUNC)


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that nobody took."""
    for fd in fds:
        os.close(fd)
