"""What the server refuses before it serves: each error is one line that says what to do."""

from __future__ import annotations

__all__ = ["ServerError", "SocketBusyError", "SocketPathError"]


class ServerError(Exception):
    """A reason not to serve, told in one line for the person who started the server."""


class SocketPathError(ServerError):
    """The socket cannot be made at this path."""


class SocketBusyError(SocketPathError):
    """Another process listens at this path."""
