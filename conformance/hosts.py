"""Where the server under test comes from: it listens somewhere already, or is started for each check.

A host hands out connections and tells a server that ended from one that died.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import socket
import subprocess
from pathlib import Path
from typing import Final, Protocol

import trio

from conformance.checks import Failed, GoneError

RETRY_S: Final = 0.01
"""Seconds until a socket that takes no client is tried again: unix sockets cannot be waited for there."""

LAST_BREATH_S: Final = 2.0
"""Seconds that a started server that closed its socket has to end, before it is taken for alive."""


class Host(Protocol):
    """Where connections come from."""

    patience: float
    """Seconds within which a server takes a client and answers it."""

    async def begin(self) -> None:
        """A check begins."""

    async def open(self) -> socket.socket:
        """A new connection, non-blocking. Raises `Failed` if the server died, `GoneError` if nobody is
        there.
        """

    async def ended(self) -> bool:
        """Whether the server has ended of its own will, as one may that lost its client; `Failed` if it
        died.
        """

    async def end(self) -> None:
        """The check is over."""


class Listening:
    """A server that listens at a path and is left alone."""

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self.patience = patience

    async def begin(self) -> None:
        """Nothing to do."""

    async def open(self) -> socket.socket:
        """See `Host.open`."""
        deadline = trio.current_time() + self.patience
        while (connected := _connect(self.path)) is None:
            if trio.current_time() > deadline:
                raise Failed("a server that accepts", f"no room for a client within {self.patience:g} s")
            await trio.sleep(RETRY_S)
        if isinstance(connected, OSError):
            raise GoneError(f"{self.path}: {connected.strerror}")
        return connected

    async def ended(self) -> bool:
        """It is not ours, and so has to stay."""
        return False

    async def end(self) -> None:
        """Nothing to do."""


class Started:
    """A server that is started anew for each check, and again whenever it ended with its client.

    `command` is split as a shell would; ``{socket}`` in it becomes `path`. Whatever lies at the path is
    removed before each start.
    """

    def __init__(self, command: str, path: Path, patience: float) -> None:
        self.path = path
        self.patience = patience
        self._words = [word.replace("{socket}", os.fspath(path)) for word in shlex.split(command)]
        self._process: subprocess.Popen[bytes] | None = None

    async def begin(self) -> None:
        """Start it; `GoneError` if there is no such program."""
        self.path.unlink(missing_ok=True)
        try:
            self._process = subprocess.Popen(  # noqa: ASYNC220
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,
            )
        except OSError as error:
            raise GoneError(f"{self._words[0]}: {error.strerror}") from None

    async def open(self) -> socket.socket:
        """See `Host.open`; a server that ended is started again."""
        deadline = trio.current_time() + self.patience
        while True:
            connected = _connect(self.path)
            if isinstance(connected, socket.socket):
                return connected
            if self._status() is not None:
                await self.ended()
                await self.begin()
            elif trio.current_time() > deadline:
                raise Failed("a server that accepts", f"no room for a client within {self.patience:g} s")
            await trio.sleep(RETRY_S)

    async def ended(self) -> bool:
        """See `Host.ended`."""
        with trio.move_on_after(LAST_BREATH_S):
            while self._status() is None and isinstance(_refused(self.path), OSError):  # noqa: ASYNC110
                await trio.sleep(RETRY_S)
        status = self._status()
        if status is not None and status < 0:
            raise Failed("a server that lives", f"its death of {signal.Signals(-status).name}")
        return status is not None

    async def end(self) -> None:
        """Kill it, if it still runs."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        self.path.unlink(missing_ok=True)

    def _status(self) -> int | None:
        return self._process.poll() if self._process else None


def _connect(path: Path) -> socket.socket | OSError | None:
    """A connection, None if there is no room now, or why there never will be."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        made.connect(os.fspath(path))
    except OSError as error:
        made.close()
        return None if error.errno == errno.EAGAIN else error
    return made


def _refused(path: Path) -> OSError | None:
    """Why nobody can be connected to, None if somebody can."""
    connected = _connect(path)
    if isinstance(connected, socket.socket):
        connected.close()
        return None
    return connected
