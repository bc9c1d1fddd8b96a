"""Who broke the rules: the peer (`RemoteProtocolError`) or the program on this side
(`LocalProtocolError`).
"""

from __future__ import annotations

import os


class ProtocolError(Exception):
    """A breach of the vfio-user protocol; `errno` is the number an error reply carries."""

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(f"{reason} [{os.strerror(errno)}]")
        self.errno = errno
        self.reason = reason


class LocalProtocolError(ProtocolError):
    """This side asked the engine for something the protocol forbids; nothing was sent and the connection
    stays usable.
    """


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol.

    `fatal` means that the byte stream can no longer be trusted, or that the session never came to be: the
    only way on is to close the connection. Otherwise one message was refused and the next one is read as
    usual.
    """

    def __init__(self, errno: int, reason: str, *, fatal: bool = True) -> None:
        super().__init__(errno, reason)
        self.fatal = fatal
