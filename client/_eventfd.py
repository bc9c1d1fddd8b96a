"""Eventfds that a server has as well, and may be hostile with."""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

_KIND: Final = "anon_inode:[eventfd]"


def make_eventfd() -> int:
    """A new one that counts nothing yet; to be closed by the caller."""
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor that came from a server is one: writing to anything else could block, or worse."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) == _KIND
    except OSError:
        return False


def take(fd: int) -> int:
    """What the counter has, which is 0 afterwards.

    Never blocks: the server has the same open file and could take its O_NONBLOCK away.
    """
    count = bytearray(8)
    try:
        os.preadv(fd, (count,), -1, os.RWF_NOWAIT)
    except BlockingIOError:
        return 0
    return int.from_bytes(count, sys.byteorder)


def identity(fd: int) -> int | None:
    """A number that all descriptors of one eventfd share, and no other eventfd has while it is open
    (Documentation/filesystems/proc.rst, "Eventfd files"; Linux 5.2). None if it is no eventfd.
    """
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text()
    except OSError:
        return None
    _, found, number = lines.partition("\neventfd-id:")
    return int(number.partition("\n")[0]) if found else None


def signal(fd: int) -> None:
    """Add one, unless the counter is full: then the server has a wake-up that it has not read.

    The server may have made the file block, so room is asked for first. One that does both, and fills the
    counter between the two, holds this thread: like mapped memory, eventfds are for servers that one trusts
    so far.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if any(event & select.POLLOUT for _, event in poll.poll(0)):
        with suppress(BlockingIOError):  # filled between the two
            os.eventfd_write(fd, 1)
