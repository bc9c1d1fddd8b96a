"""The host's end of an interrupt: an eventfd and what was heard on it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class Listener:
    """Owns one eventfd."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def heard(self) -> int:
        """How many signals came since the last call."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def say(self) -> None:
        """Signal, where the host is the one who signals."""
        os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        os.close(self.fd)


@contextmanager
def listeners(count: int) -> Iterator[list[Listener]]:
    """`count` listeners for the length of a with block."""
    made = [Listener() for _ in range(count)]
    try:
        yield made
    finally:
        for listener in made:
            listener.close()
