"""What can go wrong with /dev/kvm."""

from __future__ import annotations

import errno as _errno
import os

from client.errors import ClientError


class KvmError(ClientError):
    """KVM refuses, or cannot be had; `errno` says why."""

    def __init__(self, doing: str, errno: int) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{doing}: {os.strerror(errno)} [{name}]")
        self.doing = doing
        self.errno = errno


class GuestError(ClientError):
    """The guest did what its machine has no answer to: it is our program, so one of the two is wrong."""
