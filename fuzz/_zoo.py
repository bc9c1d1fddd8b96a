"""One descriptor of every kind that a client might send where memory or an eventfd is wanted."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
from typing import Final

from fuzz._choices import PAGE, Choices

MEMORY_PAGES: Final = 64
"""Of the one memory that fits where memory is wanted."""

NAME: Final = "hostile"
"""Of all memory here: mappings and descriptors of it are found by that name."""


class Zoo:
    """Open descriptors, by kind; `guest` is a mapping of the good memory, as a driver has one."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self.kinds: dict[str, int] = {}
        memory = self._memory("memory", MEMORY_PAGES * PAGE)
        self.guest = self._held.enter_context(mmap.mmap(memory, MEMORY_PAGES * PAGE))
        self._memory("page", PAGE)
        self._memory("unaligned", PAGE + 1)
        self._memory("empty", 0)
        self._memory("endless", 1 << 62)
        sealed = self._memory("sealed", PAGE, os.MFD_ALLOW_SEALING)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._memory("treacherous", 16 * PAGE)
        self._add("read only", os.open(f"/proc/self/fd/{memory}", os.O_RDONLY))
        self._add("write only", os.open(f"/proc/self/fd/{memory}", os.O_WRONLY))
        self._add("path", os.open(f"/proc/self/fd/{memory}", os.O_PATH))
        self._add("event", os.eventfd(0, os.EFD_NONBLOCK))
        self._add("blocking event", os.eventfd(0))
        self._add("semaphore event", os.eventfd(7, os.EFD_NONBLOCK | os.EFD_SEMAPHORE))
        self._add("full event", os.eventfd(0))
        os.eventfd_write(self.kinds["full event"], (1 << 64) - 2)
        reading, writing = os.pipe()
        self._add("pipe's reading end", reading)
        self._add("pipe's writing end", writing)
        self._add("folder", os.open("/", os.O_RDONLY | os.O_DIRECTORY))
        self._add("zeros", os.open("/dev/zero", os.O_RDWR))
        self._add("null", os.open("/dev/null", os.O_RDWR))
        ours, theirs = socket.socketpair()
        theirs.close()
        self._add("abandoned socket", ours.detach())
        self._add("datagrams", socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach())
        self._held.enter_context(poll := select.epoll())
        self.kinds["poll"] = poll.fileno()
        self._add("process", os.pidfd_open(os.getpid()))

    def close(self) -> None:
        """Close them all."""
        self._held.close()

    def refresh(self) -> None:
        """Put back what clients may have spoilt."""
        os.ftruncate(self.kinds["treacherous"], 16 * PAGE)
        for kind in ("event", "blocking event", "semaphore event"):
            with contextlib.suppress(BlockingIOError):
                os.set_blocking(self.kinds[kind], False)
                os.eventfd_read(self.kinds[kind])
        os.set_blocking(self.kinds["blocking event"], True)

    def betray(self) -> None:
        """Take memory away that may be mapped."""
        os.ftruncate(self.kinds["treacherous"], 0)

    def some(self, choices: Choices, wanted: str, count: int) -> list[int]:
        """`count` descriptors of the kind `wanted`, or of any."""
        if choices.often():
            return [self.kinds[wanted]] * count
        return [self.kinds[choices.pick(tuple(self.kinds))] for _ in range(count)]

    def _memory(self, kind: str, size: int, flags: int = 0) -> int:
        fd = os.memfd_create(NAME, os.MFD_CLOEXEC | flags)
        self._add(kind, fd)
        os.ftruncate(fd, size)
        return fd

    def _add(self, kind: str, fd: int) -> None:
        self.kinds[kind] = fd
        self._held.callback(os.close, fd)
