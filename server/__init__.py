"""A device on a socket: the trio loop that serves PCI functions over vfio-user."""

from server.errors import ServerError, SocketBusyError, SocketPathError
from server.listener import Listener

__all__ = ["Listener", "ServerError", "SocketBusyError", "SocketPathError"]
