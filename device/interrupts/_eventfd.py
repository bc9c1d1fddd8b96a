"""Eventfds that belong to somebody else."""

import errno
import os
import select
import stat
from contextlib import suppress
from pathlib import Path

from device.errors import DeviceError

_KIND = "anon_inode:[eventfd]"
_COUNTER_SIZE = 8


def borrow(fd: int) -> int:
    """A duplicate of the eventfd `fd`, to be closed by the caller.

    DeviceError: EINVAL if it is anything else, EBADF if it is closed.

    The kernel refuses other files too (eventfd_ctx_fdget); here a pipe or a socket could block whoever
    signals. Without /proc any anonymous inode passes: writing into one that is no eventfd fails at once.
    """
    try:
        anonymous = stat.S_IFMT(os.fstat(fd).st_mode) == 0
        with suppress(FileNotFoundError):
            anonymous = os.fspath(Path(f"/proc/self/fd/{fd}").readlink()) == _KIND
        if anonymous:
            return os.dup(fd)
    except OSError as error:
        raise DeviceError(errno.EBADF, f"an interrupt needs an open eventfd: {error.strerror}") from error
    raise DeviceError(errno.EINVAL, f"an interrupt needs an eventfd, which fd {fd} is not")


def drain(fd: int) -> bool:
    """Set the counter to zero; whether it was not. Never blocks, whatever the owner's flags say."""
    try:
        return os.preadv(fd, [bytearray(_COUNTER_SIZE)], -1, os.RWF_NOWAIT) == _COUNTER_SIZE
    except BlockingIOError:
        return False


def waiting(fd: int) -> bool:
    """Whether the counter is not zero: somebody is yet to read it."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(events & select.POLLIN for _, events in poll.poll(0))


def release(fd: int | None) -> None:
    """Close `fd`, if there is one."""
    if fd is not None:
        os.close(fd)
