"""What can go wrong on the host's side; every exception of `client` is a `ClientError`."""

from __future__ import annotations

import os
from errno import errorcode

from protocol import Command


class ClientError(Exception):
    """Base of this package's errors."""


class ConnectError(ClientError):
    """No session came to be: nobody listens, the path is wrong, or the server would not agree on a
    version.
    """


class ServerError(ClientError):
    """The server refused a request; the session goes on. `errno` is its reason, `command` the request."""

    def __init__(self, command: Command, errno: int) -> None:
        name = errorcode.get(errno, str(errno))
        super().__init__(f"the server refuses {command.name}: {os.strerror(errno)} [{name}]")
        self.command = command
        self.errno = errno


class BadReplyError(ClientError):
    """The server answered a request with nonsense; the session goes on."""

    def __init__(self, command: Command, reason: str) -> None:
        super().__init__(f"the server's answer to {command.name} makes no sense: {reason}")
        self.command = command


class Disconnected(ClientError):  # noqa: N818  (it is an event rather than somebody's error)
    """The session is over: the server left, broke the protocol, or we closed."""


class DeviceError(ClientError):
    """The device behind the server is not what a driver needs, or does not do what its specification says."""
