"""Doing something inside another network namespace without leaving our own."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from firmware.ports._port import PortError

T = TypeVar("T")

NAMED = Path("/run/netns")      # where ip-netns(8) keeps them
CLONE_NEWNET = 0x40000000       # linux/sched.h


def inside(namespace: str | None, action: Callable[[], T]) -> T:
    """Run `action` with `namespace` (a name or a path; None: ours) as its network.

    Raises PortError if there is none such. The namespace is entered by a thread of its own, which ends with
    the call, so no other thread ever sees it.
    """
    if namespace is None:
        return action()
    path = Path(namespace) if "/" in namespace else NAMED / namespace
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PortError(
            f"network namespace {namespace!r}: {error.strerror}; `ip netns list` shows those there are"
        ) from None
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
                raise PortError(f"network namespace {namespace!r} {_advice(ctypes.get_errno())}")
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter, name="network namespace")
    try:
        thread.start()
        thread.join()
    finally:
        os.close(fd)
    if errors:
        raise errors[0]
    return results[0]


def _advice(number: int) -> str:
    match number:
        case errno.EPERM:
            return "cannot be entered: permission denied; run as root"
        case errno.EINVAL:
            return "is a file of another kind; `ip netns list` shows the namespaces there are"
        case _:
            return f"cannot be entered: {os.strerror(number)}"
