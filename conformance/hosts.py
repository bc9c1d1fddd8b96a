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

from conformance.checks import Failed, GoneError, Silent

RETRY_S: Final = 0.01
"""Seconds until a socket that takes no client is tried again: unix sockets cannot be waited for there."""

LAST_BREATH_S: Final = 1.0
"""Seconds that a started server has to end, if it ends with its client."""

SHORT_GRACE_S: Final = 0.02
"""The same for one that has been seen to go on: some end only after clients that were refused."""

POLL_S: Final = 0.001
"""Seconds between two looks at a process that may end."""


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
                raise Silent("a server that accepts", f"no room for a client within {self.patience:g} s")
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
        self._was_open = False
        self._grace = LAST_BREATH_S

    async def begin(self) -> None:
        """Start it; `GoneError` if there is no such program."""
        self.path.unlink(missing_ok=True)
        self._was_open = False
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
        """See `Host.open`; a server that ended with its last client is started again."""
        if self._was_open and not await self._ends(self._grace):
            # It went on without its client, and so will most of the time: no more is waited for long.
            self._grace = SHORT_GRACE_S
        deadline = trio.current_time() + self.patience
        while True:
            if self._status() is not None:
                await self.ended()
                await self.begin()
            connected = _connect(self.path)
            if isinstance(connected, socket.socket):
                self._was_open = True
                return connected
            if trio.current_time() > deadline:
                raise Silent("a server that accepts", f"no room for a client within {self.patience:g} s")
            await trio.sleep(RETRY_S)

    async def ended(self) -> bool:
        """See `Host.ended`."""
        await self._ends(LAST_BREATH_S)
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

    async def _ends(self, seconds: float) -> bool:
        """Whether it ends in this time."""
        with trio.move_on_after(seconds):
            while self._status() is None:  # noqa: ASYNC110  nobody tells but the kernel, when asked
                await trio.sleep(POLL_S)
        return self._status() is not None

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
