"""A unix stream socket, each frame behind its length: passt, and QEMU's `-netdev stream` (net/stream.c)."""

from __future__ import annotations

import errno
import logging
import math
import socket
from pathlib import Path

import trio

from firmware.ports._listening import Listening, check_path
from firmware.ports._port import Framing, Port, PortError

__all__ = ["StreamPort"]

log = logging.getLogger("trionic.port")

# What a peer that is not there yet looks like; all else needs somebody's hand.
_NOT_YET = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN})


class StreamPort(Port):
    """A connection to the peer that listens at `path`, or from one that connects to `listen`.

    No peer, no link. A peer that has gone is followed by the next: `reconnect` seconds at least lie between
    two attempts to find one, None means that there is one attempt and one peer. Raises PortError where no
    socket can be had, or no peer with `reconnect` None.
    """

    kind = "stream"
    framing = Framing.STREAM

    def __init__(self, spec: str, *, path: str | None, listen: str | None, reconnect: float | None) -> None:
        super().__init__(spec)
        self.link_up = False
        self._interval = reconnect
        self._next_attempt = -math.inf
        self._peer: socket.socket | None = None
        self._had_peer = False
        self._lost = trio.Event()
        self._complaint: str | None = None
        self._listener: Listening | None = None
        if path is not None and listen is None:
            check_path(path)
            self._path = path
            if Path(path).exists() and not Path(path).is_socket():
                raise PortError(f"port stream: {path!r} is not a socket; choose another path")
            error = self._connect()
            if error is not None and (reconnect is None or error.errno not in _NOT_YET):
                raise PortError(_advice(self._path, error))
        elif listen is not None and path is None:
            check_path(listen)
            self._path = listen
            self._listener = Listening(listen)
        else:
            raise PortError(
                "port stream needs either path=SOCKET, to connect, or listen=SOCKET, to be connected to"
            )

    def _connect(self) -> OSError | None:
        """Try once; a peer with a full backlog is no reason to wait."""
        attempt = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            attempt.connect(self._path)
        except OSError as error:
            attempt.close()
            return error
        self._use(attempt)
        return None

    def _use(self, peer: socket.socket) -> None:
        self._peer = peer
        self._had_peer = True
        self._complaint = None
        self._lost = trio.Event()
        self.fd = peer.fileno()
        self.link_up = True

    async def run(self) -> None:
        """Find a peer whenever there is none; ends with the only one where `reconnect` is None."""
        while True:
            if self._peer is None:
                if self._interval is None and self._had_peer:
                    log.warning("port %s: the peer has gone, and reconnect=no", self.spec)
                    return
                await (self._await_peer() if self._listener else self._seek_peer())
                log.info("port %s: connected", self.spec)
                self.on_change()
            await self._lost.wait()

    async def _seek_peer(self) -> None:
        assert self._interval is not None
        while True:
            await trio.sleep_until(self._next_attempt)
            self._next_attempt = trio.current_time() + self._interval
            error = self._connect()
            if error is None:
                return
            self._complain(_advice(self._path, error))

    async def _await_peer(self) -> None:
        assert self._listener is not None
        while True:
            await trio.sleep_until(self._next_attempt)
            await trio.lowlevel.wait_readable(self._listener.socket)
            try:
                peer, _ = self._listener.socket.accept()
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                    self._complain(f"port {self.spec}: {error.strerror}")
                    self._next_attempt = trio.current_time() + (self._interval or 1)
                continue
            peer.setblocking(False)
            self._use(peer)
            return

    def _complain(self, complaint: str) -> None:
        """Once for each reason."""
        if complaint != self._complaint:
            self._complaint = complaint
            log.warning("%s; still trying", complaint)

    def peer_lost(self) -> None:
        """The peer has gone, or spoke nonsense: `run` looks for another."""
        super().peer_lost()
        self._lost.set()

    def _hang_up(self) -> None:
        if self._peer is not None:
            self._peer.close()
            self._peer = None

    def close(self) -> None:
        """Hang up and, where we listened, remove the socket's file."""
        self.fd = -1
        self._hang_up()
        if self._listener is not None:
            self._listener.close()


def _advice(path: str, error: OSError) -> str:
    match error.errno:
        case errno.ENOENT | errno.ECONNREFUSED:
            return f"port stream: nobody listens at {path!r}; start the peer, such as `passt --socket {path}`"
        case errno.EAGAIN:
            return f"port stream: the peer at {path!r} is busy with others; end one of them"
        case errno.EACCES | errno.EPERM:
            return f"port stream: no permission to connect to {path!r}; run as its owner, or ask for a chmod"
        case errno.EPROTOTYPE:
            return f"port stream: {path!r} is not a stream socket; start the peer with a unix stream socket"
        case _:
            return f"port stream: {path!r}: {error.strerror}"
