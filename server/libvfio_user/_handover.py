"""A client's connection, brought into a context of the library.

The library accepts and negotiates in one call that waits for the client, so a silent one would stop every
card of the process. Here the client is accepted by our own listener, and its VERSION awaited like any other
message. Only then a context is made, at a socket in a private folder; VERSION goes to it through that
socket, its answer comes back the same way, and the client's connection takes the place of the private one
(`dup2`). The library never waits, its socket file is never seen by others, and the listener stays while
contexts come and go.
"""

from __future__ import annotations

import array
import os
import socket
from pathlib import Path
from typing import Final

from server._descriptors import close_all, receive
from server.libvfio_user._context import Context
from server.libvfio_user.library import LibraryError

__all__ = ["hand_over"]

# The reply to VERSION is shorter (its JSON has at most 1 KiB in 2022) and brings one descriptor at most.
_REPLY_SIZE: Final = 4096


def hand_over(context: Context, client: socket.socket, path: Path, version: bytes) -> int | None:
    """Let ``context``, which listens at ``path``, negotiate by ``version`` with ``client`` and take it over.

    ``client`` stays the caller's; both ends of it then read from one stream. The client's end of a twin
    socket, if one was agreed on, becomes the caller's. `LibraryError` if the library refuses the client, who
    has been told, or OSError if it is gone.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as private:
        private.connect(os.fspath(path))
        path.unlink()
        private.sendall(version)
        refused: LibraryError | None = None
        try:
            context.attach()
        except LibraryError as error:
            refused = error
        reply, fds, _ = receive(private, _REPLY_SIZE)
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            client.sendmsg([reply], rights, socket.MSG_NOSIGNAL)
            if refused is not None:
                raise refused
            os.dup2(client.fileno(), context.fd, inheritable=False)
        except BaseException:
            close_all(fds)
            raise
        return fds[0] if fds else None
