"""Eventfds that a server has as well, and may be hostile with."""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Final

_KIND: Final = "anon_inode:[eventfd]"


def is_eventfd(fd: int) -> bool:
    """Whether a descriptor that came from a server is one: writing to anything else could block, or worse."""
    try:
        return str(Path(f"/proc/self/fd/{fd}").readlink()) == _KIND
    except OSError:
        return False


def signal(fd: int) -> None:
    """Add one, unless the counter is full: then the server has a wake-up that it has not read.

    The server may have made the file block, so room is asked for first. One that fills the counter between
    the two holds this thread: like mapped memory, eventfds are for servers that one trusts so far.
    """
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if any(event & select.POLLOUT for _, event in poll.poll(0)):
        os.eventfd_write(fd, 1)
