"""The client's memory where no file descriptor of it came: reached by asking the client for each access."""

from typing import Protocol


class RemoteMemory(Protocol):
    """What a server puts into `DmaWindows.remote`: the DMA_READ and DMA_WRITE messages of one session.

    Any thread may call, never one that holds the card's gate: answering may need it. Both block until the
    client has answered, and raise DeviceError: with the client's errno when it refuses, EIO when its answer
    is none, ETIMEDOUT when it says nothing for too long, ENOTCONN when it is gone.
    """

    def read(self, iova: int, length: int) -> bytes:
        """The client's `length` bytes at `iova`."""

    def write(self, iova: int, data: bytes) -> None:
        """Write `data` at `iova`; returns when it is there."""
