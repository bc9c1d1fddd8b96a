"""A Unix stream socket, each frame behind its length: what passt and QEMU's `-netdev stream` speak."""

from __future__ import annotations

import logging
import socket

import trio

from firmware.ports._listening import Listening, check_path
from firmware.ports._port import Framing, Port, PortError

log = logging.getLogger("trionic.port")


class StreamPort(Port):
    """A connection to the socket at `path`, or from the one peer that came to the socket made at `listen`.

    No peer, no link. A connection that is lost is made again: it is tried at `path` every `reconnect` seconds
    (default: 1); at `listen` one peer is served at a time, the next one waits. Raises PortError.
    """

    kind = "stream"
    framing = Framing.STREAM

    def __init__(
        self, spec: str, *, path: str | None = None, listen: str | None = None, reconnect: float | None = None
    ) -> None:
        super().__init__(spec)
        place = path if listen is None else listen
        if place is None or (path is not None and listen is not None):
            raise PortError("port stream needs path=SOCKET of a peer, or listen=SOCKET to make, and not both")
        if listen is not None and reconnect is not None:
            raise PortError("port stream: reconnect goes with path; with listen it is the peer that connects")
        check_path(place)
        self._path = place
        self._interval = 1.0 if reconnect is None else reconnect
        self._peer: socket.socket | None = None
        self._lost = trio.Event()
        self._listening = None if listen is None else Listening(listen)
        self.link_up = False
        if self._listening is None:
            self._connect()

    def _connect(self) -> bool:
        attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            attempt.connect(self._path)     # at once or, when the peer's backlog is full, not
        except OSError as error:
            attempt.close()
            log.debug("%s: %s", self._path, error.strerror)
            return False
        self._plug(attempt)
        return True

    def _accept(self, listening: Listening) -> bool:
        try:
            peer, _ = listening.socket.accept()
        except OSError as error:
            log.debug("%s: %s", self._path, error.strerror)
            return False
        peer.setblocking(False)
        self._plug(peer)
        return True

    def _plug(self, peer: socket.socket) -> None:
        self._peer = peer
        self.fd = peer.fileno()
        self.link_up = True
        self._lost = trio.Event()

    def _unplug(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None
            self.fd = -1
            self.link_up = False

    async def run(self) -> None:
        """Find a peer, whenever there is none."""
        while True:
            if self._peer is None:
                await self._find_peer()
                log.info("%s: connected", self._path)
                self.on_change()
            await self._lost.wait()

    async def _find_peer(self) -> None:
        if self._listening is not None:
            log.info("%s: waiting for a peer", self._path)
            await trio.lowlevel.wait_readable(self._listening.socket)
            while not self._accept(self._listening):
                await trio.sleep(self._interval)        # it went at once, or no descriptor is free
                await trio.lowlevel.wait_readable(self._listening.socket)
            return
        log.warning("%s: nobody listens; trying again every %g s", self._path, self._interval)
        while not self._connect():  # noqa: ASYNC110 - nothing tells of another program's socket
            await trio.sleep(self._interval)

    def peer_lost(self) -> None:
        """The peer has gone, or spoke nonsense: let go of it and look for another."""
        self._unplug()
        super().peer_lost()
        self._lost.set()

    def close(self) -> None:
        """Hang up; the socket made at `listen` goes."""
        self._unplug()
        if self._listening is not None:
            self._listening.close()
