"""Doing something inside another network namespace without leaving our own."""

from __future__ import annotations

import ctypes
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
    """Run `action` with `namespace` (a name or a path; None: ours) as its network; raises PortError if there is none such.

    The namespace is entered by a thread of its own, which ends with the call, so no other thread ever sees it.
    """
    if namespace is None:
        return action()
    path = Path(namespace) if "/" in namespace else NAMED / namespace
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PortError(f"network namespace {namespace}: {error.strerror}; `ip netns list` shows those there are") from None
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET) != 0:
                reason = os.strerror(ctypes.get_errno())
                raise PortError(f"network namespace {namespace} cannot be entered: {reason}; run as root")
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=enter, name=f"netns {namespace}")
    thread.start()
    thread.join()
    os.close(fd)
    if errors:
        raise errors[0]
    return results[0]
