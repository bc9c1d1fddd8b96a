"""A Unix stream socket, each frame behind its length: what passt and QEMU's `-netdev stream` listen for."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import trio

from firmware.ports._port import Framing, Port, PortError

log = logging.getLogger("trionic.port")

MAX_PATH = 107                  # sun_path of struct sockaddr_un, less its final zero


class StreamPort(Port):
    """A connection to the socket at `path`, made again every `reconnect` seconds while there is none; no peer, no link."""

    kind = "stream"
    framing = Framing.STREAM

    def __init__(self, spec: str, *, path: str, reconnect: float = 1.0) -> None:
        super().__init__(spec)
        if len(path.encode()) > MAX_PATH:
            raise PortError(f"port stream: {path!r} is longer than the {MAX_PATH} bytes a socket's path may have")
        if not Path(path).absolute().parent.is_dir():
            raise PortError(f"port stream: there is no directory for {path!r}")
        self._path = path
        self._interval = reconnect
        self._socket: socket.socket | None = None
        self._lost = trio.Event()
        self.link_up = False
        self._connect()

    def _connect(self) -> bool:
        attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            attempt.connect(self._path)
        except OSError as error:
            attempt.close()
            log.debug("%s: %s", self._path, error.strerror)
            return False
        attempt.setblocking(False)
        self._socket = attempt
        self.fd = attempt.fileno()
        self.link_up = True
        self._lost = trio.Event()
        return True

    async def run(self) -> None:
        """Connect, whenever there is no connection."""
        while True:
            if self._socket is None:
                log.warning("nobody listens at %s; trying again every %g s", self._path, self._interval)
                while not self._connect():
                    await trio.sleep(self._interval)
                log.info("connected to %s", self._path)
                self.on_change()
            await self._lost.wait()

    def peer_lost(self) -> None:
        """The peer has gone, or spoke nonsense: let go of it and look for another."""
        self.close()
        super().peer_lost()
        self._lost.set()

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.fd = -1
