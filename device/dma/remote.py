"""The client's memory where no file descriptor of it came: reached by asking the client for each access."""

from collections.abc import Callable
from errno import EIO
from typing import Final, Protocol

from device.errors import DeviceError

Wanted = Callable[[], bool]
"""Whether an access that was asked for is still to be made; to be called with the gate held."""


MAX_ERRNO: Final = 4095  # linux/err.h


def always() -> bool:
    """For accesses that nothing overtakes."""
    return True


class UnwantedError(DeviceError):
    """The card was reset or halted, or the window is gone, before the access was asked of the client."""


def errno_of(error: DeviceError) -> int:
    """What the client refused with, or EIO where that is no errno."""
    number = error.errno
    return number if number is not None and 0 < number <= MAX_ERRNO else EIO


class RemoteMemory(Protocol):
    """What a server puts into `DmaWindows.remote`: the DMA_READ and DMA_WRITE messages of one session.

    Any thread may call, never one that holds the card's gate: answering may need it. Both block until the
    client has answered, and raise DeviceError: with the client's errno when it refuses, EIO when its answer
    is none, ETIMEDOUT when it says nothing for too long, ENOTCONN when it is gone.

    Between the call and the message the gate is free, and a reset or an unmap may come and be answered. What
    is asked of the client after that would reach memory that its driver has put to other use. So `wanted` is
    called with the gate held, and the message is on its way before the gate is left, or not sent at all
    (`UnwantedError`).
    """

    def read(self, iova: int, length: int, wanted: Wanted = always) -> bytes:
        """The client's `length` bytes at `iova`."""

    def write(self, iova: int, data: bytes, wanted: Wanted = always) -> None:
        """Write `data` at `iova`; returns when it is there."""
