"""A unix stream socket, each frame behind its length: passt, and QEMU's `-netdev stream` (net/stream.c)."""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import stat
from pathlib import Path

import trio

from firmware.ports._port import Framing, Port, PortError

__all__ = ["StreamPort"]

log = logging.getLogger("trionic.port")

MAX_PATH = 107  # bytes in sun_path of struct sockaddr_un, less its final zero
BACKLOG = 1  # a peer that may wait until the one before has gone
MODE = 0o600  # whoever can connect is the network, so only the owner can

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
        self._lost = trio.Event()
        self._complaint: str | None = None
        self._listener: _Listener | None = None
        if path is not None and listen is None:
            self._path = _checked(path)
            if Path(path).exists() and not Path(path).is_socket():
                raise PortError(f"port stream: {path!r} is not a socket; choose another path")
            error = self._connect()
            if error is not None and (reconnect is None or error.errno not in _NOT_YET):
                raise PortError(_advice(self._path, error))
        elif listen is not None and path is None:
            self._path = _checked(listen)
            self._listener = _Listener(self._path)
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
        self._complaint = None
        self._lost = trio.Event()
        self.fd = peer.fileno()
        self.link_up = True

    async def run(self) -> None:
        """Find a peer whenever there is none; ends with the only one where `reconnect` is None."""
        while True:
            if self._peer is None:
                await (self._await_peer() if self._listener else self._seek_peer())
                log.info("port %s: connected", self.spec)
                self.on_change()
            await self._lost.wait()
            if self._interval is None:
                log.warning("port %s: the peer has gone, and reconnect=no", self.spec)
                return
            log.info("port %s: the peer has gone", self.spec)

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


class _Listener:
    """A listening socket whose file is its owner's alone; a stale file is replaced, all else refused."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self.socket = socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        )
        try:
            self._clear_stale()
            # unix_bind_bsd() takes the file's mode from the unbound socket: it is never open to others.
            os.fchmod(self.socket.fileno(), MODE)
            self.socket.bind(path)
            self._identity = self._identify()
            self.socket.listen(BACKLOG)
        except OSError as error:
            self.socket.close()
            raise PortError(
                f"port stream: cannot listen at {path!r}: {error.strerror}; choose another path"
            ) from None
        except PortError:
            self.socket.close()
            raise

    def _clear_stale(self) -> None:
        try:
            if not stat.S_ISSOCK(self._path.lstat().st_mode):
                raise PortError(
                    f"port stream: {str(self._path)!r} exists and is not a socket; choose another path"
                )
        except FileNotFoundError:
            return
        with socket.socket(
            socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        ) as probe:
            error = probe.connect_ex(os.fspath(self._path))
        if error == errno.ECONNREFUSED:
            self._path.unlink(missing_ok=True)
        elif error != errno.ENOENT:
            raise PortError(
                f"port stream: another program listens at {str(self._path)!r};"
                " connect to it by path=, or choose another"
            )

    def _identify(self) -> tuple[int, int]:
        status = self._path.lstat()
        return status.st_dev, status.st_ino

    def close(self) -> None:
        if self.socket.fileno() < 0:
            return
        try:
            if self._identify() == self._identity:
                self._path.unlink()
        except OSError:
            log.debug("%s was removed already", self._path)
        self.socket.close()


def _checked(path: str) -> str:
    if len(os.fsencode(path)) > MAX_PATH:
        raise PortError(
            f"port stream: the path {path!r} is too long; a socket's has at most {MAX_PATH} bytes"
        )
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise PortError(
            f"port stream: {path!r} is in no folder; make {str(folder)!r} first, or choose another path"
        )
    return path


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
