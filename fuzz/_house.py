"""A card served in a thread of its own, and what one client after another leaves behind.

The server's clock stands still unless it is moved: no deadline passes because the machine is busy, and every
one passes at once where it is meant to.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio
import trio.testing

from firmware import Nic
from firmware.ports import open_port
from fuzz._zoo import NAME
from server import serve
from tests.server.raw import GET_INFO, message, version

PATIENCE: Final = 20.0
"""Seconds by the wall's clock after which a server that says nothing is said to hang."""

BAR2_SIZE: Final = 64 << 10


class HangError(AssertionError):
    """The server does nothing although it should."""


class LeakError(AssertionError):
    """A client left something behind."""


class _Mistakes(logging.Handler):
    """Keeps what was logged with a traceback: a mistake in the card's code or the server's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []
        self.lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += 1
        if record.exc_info:
            self.found.append(logging.Formatter().format(record))


@dataclass(frozen=True, slots=True)
class Possessions:
    """What the process has while nobody but an honest client is there."""

    fds: Counter[str]
    mappings: int


class House:
    """Serves a network card at `folder`/card; `prepare(nic)` is called before the first client."""

    def __init__(self, folder: Path, prepare: Callable[[Nic], None] | None = None) -> None:
        self.path = folder / "card"
        self.nic = Nic(open_port("loopback"), mac=b"\x02\0\0\0\0\1", bar2_size=BAR2_SIZE)
        if prepare is not None:
            prepare(self.nic)
        self._mistakes = _Mistakes()
        self._loggers = [logging.getLogger(name) for name in ("trionic", "device")]
        for logger in self._loggers:
            logger.addHandler(self._mistakes)
            logger.propagate = False
        self._clock = trio.testing.MockClock()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._live, name="house")
        self._thread.start()
        if not self._started.wait(PATIENCE):
            raise HangError("the server does not start")
        gc.collect()  # what others left to the collector is none of this house's
        self.before = self.possessions()

    def close(self) -> None:
        """Stop serving; raises what went wrong in the server."""
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(PATIENCE)
        for logger in self._loggers:
            logger.removeHandler(self._mistakes)
            logger.propagate = True
        if self._thread.is_alive():
            raise HangError("the server does not end")
        self.nic.close()
        if self._failure is not None:
            raise self._failure

    def connect(self) -> socket.socket:
        """A client that has said nothing."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(PATIENCE)
        client.connect(os.fspath(self.path))
        return client

    def pass_time(self, seconds: float) -> None:
        """Move the server's clock."""
        trio.from_thread.run_sync(self._clock.jump, seconds, trio_token=self._token)

    def settle(self) -> None:
        """Until the server has seen that the last client left, and has nothing to do."""
        trio.from_thread.run(trio.testing.wait_all_tasks_blocked, trio_token=self._token)

    def check(self) -> None:
        """Once a client has left: the next one is served, and nothing of the other is left.

        Raises AssertionError: HangError, LeakError, or about a mistake that was logged.
        """
        after = self.possessions()
        self.settle()
        if self._mistakes.found:
            raise AssertionError("the server made a mistake:\n" + self._mistakes.found.pop())
        fds = after.fds - self.before.fds
        mappings = after.mappings - self.before.mappings
        if fds or mappings > 0:
            raise LeakError(f"left behind: {dict(fds)}, {mappings} mappings")
        function = self.nic.function
        left = {
            "DMA windows": len(function.dma),
            "interrupts": function.interrupts.active,
            "an unmask eventfd": function.unmask_fd,
            "a driver": int(self.nic.card.transport.status),
        }
        if any(left.values()):
            raise LeakError(f"left behind: {left}")

    def possessions(self) -> Possessions:
        """What there is while an honest client is served."""
        with self.connect() as client:
            try:
                client.sendall(version())
                _receive(client)
                client.sendall(message(GET_INFO, bytes((16, *[0] * 15))))
                reply = _receive(client)
            except TimeoutError:
                raise HangError("the next client is not served") from None
            if reply[8:16] != bytes((1, *[0] * 7)):
                raise AssertionError(f"the next client is refused: {reply!r}")
            return Possessions(_open_fds(), _mappings())

    def _live(self) -> None:
        try:
            trio.run(self._serve, clock=self._clock)
        except BaseException as error:
            self._failure = error
            self._started.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.nic.run)

                async def start(task_status: trio.TaskStatus[None]) -> None:
                    await serve([(self.nic.function, self.path)], task_status=task_status)

                await nursery.start(start)
                self._started.set()


def _receive(client: socket.socket) -> bytes:
    """One reply of a server that is well."""
    reply = b""
    wanted = 16
    while len(reply) < wanted:
        piece = client.recv(wanted - len(reply))
        if not piece:
            raise AssertionError("the server hangs up on an honest client")
        reply += piece
        if len(reply) == 16:
            wanted = int.from_bytes(reply[4:8], "little")
    return reply


def _open_fds() -> Counter[str]:
    found = []
    for entry in os.scandir("/proc/self/fd"):
        try:
            target = os.readlink(entry.path)  # noqa: PTH115 - this is done for every client
        except FileNotFoundError:
            continue  # the folder that is being listed
        # numbers of sockets, pipes and files differ from client to client
        found.append(target.partition("[")[0] if target.startswith(("socket:", "pipe:")) else target)
    return Counter(found)


def _mappings() -> int:
    with open("/proc/self/maps", "rb") as maps:  # noqa: PTH123 - as is this
        return maps.read().count(b"/memfd:" + NAME.encode())
