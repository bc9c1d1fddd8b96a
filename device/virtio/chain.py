"""A buffer of a virtqueue, for devices written in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from device.dma import DmaWindows, Pin

if TYPE_CHECKING:
    from typing_extensions import Buffer


class DescriptorChain:
    """A popped chain: `readable` and `writable` are its segments as (address, length).

    Every access goes through the DMA windows of that moment, so a chain may be held while windows change.
    Those that hold its memory do not, for as long as the queue has a `pin` for it (VirtQueue.pop).
    """

    __slots__ = ("_dma", "epoch", "head", "pin", "readable", "writable")

    def __init__(
        self,
        dma: DmaWindows,
        epoch: int,
        head: int,
        readable: list[tuple[int, int]],
        writable: list[tuple[int, int]],
        pin: Pin | None = None,
    ) -> None:
        self._dma = dma
        self.epoch = epoch
        self.head = head
        self.readable = readable
        self.writable = writable
        self.pin = pin

    def read(self) -> bytes:
        """All device-readable bytes; raises DeviceError as DmaWindows.read does."""
        return b"".join(self._dma.read(address, length) for address, length in self.readable)

    def write(self, data: Buffer) -> int:
        """Fill the device-writable segments with `data`; returns the number of bytes that fitted.

        Raises DeviceError as DmaWindows.write does.
        """
        view = memoryview(data)
        done = 0
        for address, length in self.writable:
            part = view[done : done + length]
            if not len(part):
                break
            self._dma.write(address, part)
            done += len(part)
        return done
