"""What the container refuses."""

from __future__ import annotations

import os
from errno import errorcode

from client.errors import ClientError


class ContainerError(ClientError):
    """Nothing was changed; `errno` is what the kernel's container would say."""

    def __init__(self, errno: int, reason: str) -> None:
        super().__init__(f"{reason}: {os.strerror(errno)} [{errorcode.get(errno, errno)}]")
        self.errno = errno
