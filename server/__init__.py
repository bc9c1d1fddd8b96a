"""A device on a socket: the trio loop that serves PCI functions over vfio-user.

Names are loaded when they are first used: a command that makes its sockets first is there for its clients
before trio and the protocol are loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

from server.errors import ServerError, SocketBusyError, SocketPathError
from server.listener import Listener

if TYPE_CHECKING:
    from protocol.limits import SessionLimits
    from server.releasing import Release
    from server.serving import serve
    from server.session import Session

__all__ = [
    "Listener",
    "Release",
    "ServerError",
    "Session",
    "SessionLimits",
    "SocketBusyError",
    "SocketPathError",
    "serve",
]

_LATER = {
    "Release": "server.releasing",
    "Session": "server.session",
    "SessionLimits": "protocol.limits",
    "serve": "server.serving",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
