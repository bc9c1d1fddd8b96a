"""ioctl that lets other threads run meanwhile, and says EINTR instead of trying again."""

from __future__ import annotations

import ctypes
import os
from ctypes import Array, Structure
from typing import Any, Final

_libc: Final = ctypes.CDLL(None, use_errno=True)


def ioctl(fd: int, request: int, argument: int | Structure | Array[Any] = 0) -> int:
    """What the kernel answers; raises OSError. A structure may come back changed."""
    value = ctypes.c_ulong(argument) if isinstance(argument, int) else ctypes.byref(argument)
    answer: int = _libc.ioctl(fd, ctypes.c_ulong(request), value)
    if answer < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return answer


def flexible(header: Structure, entries: list[Structure] | bytes) -> Array[Any]:
    """A header and the entries behind it, as one argument."""
    tail = entries if isinstance(entries, bytes) else b"".join(map(bytes, entries))
    data = bytes(header) + tail
    return (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
