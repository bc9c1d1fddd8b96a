"""A device on a socket: the trio loop that serves PCI functions over vfio-user."""

from server.errors import ServerError, SocketBusyError, SocketPathError
from server.limits import SessionLimits
from server.listener import Listener
from server.serving import serve
from server.session import Session

__all__ = [
    "Listener",
    "ServerError",
    "Session",
    "SessionLimits",
    "SocketBusyError",
    "SocketPathError",
    "serve",
]
