"""Doing something inside another network namespace without leaving our own (setns(2))."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from firmware.ports._port import PortError

__all__ = ["inside"]

T = TypeVar("T")

NAMED = Path("/run/netns")  # where ip-netns(8) keeps them
CLONE_NEWNET = 0x40000000  # linux/sched.h


def inside(namespace: str | None, action: Callable[[], T]) -> T:
    """Run `action` with `namespace` (a name or a path; None: ours) as its network.

    A thread of its own enters the namespace and ends with the call: no other thread ever sees it, and
    sockets and devices that `action` opens stay in it. Raises PortError if there is no such namespace.
    """
    if namespace is None:
        return action()
    fd = _open(namespace)
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
                raise PortError(_refused(namespace, ctypes.get_errno()))
            results.append(action())
        except BaseException as error:
            errors.append(error)

    try:
        thread = threading.Thread(target=enter, name=f"netns {namespace}")
        thread.start()
        thread.join()
    finally:
        os.close(fd)
    if errors:
        raise errors[0]
    return results[0]


def _open(namespace: str) -> int:
    path = Path(namespace) if "/" in namespace else NAMED / namespace
    try:
        # O_NONBLOCK: a FIFO must not make us wait for somebody.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise PortError(f"network namespace {namespace!r}: {error.strerror}; choose another") from None
        if "/" in namespace:
            advice = "give the path of a namespace, like /proc/PID/ns/net"
        else:
            advice = "make it with `ip netns add`, or see `ip netns list`"
        raise PortError(f"there is no network namespace {namespace!r}; {advice}") from None


def _refused(namespace: str, error: int) -> str:
    match error:
        case errno.EPERM:
            return f"network namespace {namespace!r} cannot be entered: no permission; run as root"
        case errno.EINVAL:
            return f"{namespace!r} is not a network namespace; `ip netns list` shows those there are"
        case _:
            return f"network namespace {namespace!r} cannot be entered: {os.strerror(error)}"
