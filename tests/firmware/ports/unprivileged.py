"""Doing something as root without any of root's privileges."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_VERSION_3 = 0x20080522  # linux/capability.h


def without_capabilities(action: Callable[[], T]) -> T:
    """Run `action` in a thread of its own that has no capability; on Linux those are a thread's."""

    def enter() -> T:
        header = struct.pack("Ii", _VERSION_3, 0)
        if ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)) != 0:
            raise OSError(ctypes.get_errno(), "capset: " + os.strerror(ctypes.get_errno()))
        return action()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(enter).result()
