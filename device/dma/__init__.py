"""DMA: the windows through which a card reaches its host's memory."""

from device.dma._dirty import MAX_REPORT
from device.dma._pins import MAX_PINNED_PAGES, MAX_PINS, Pin, PinCounters, PinnedError
from device.dma._windows import MAX_WINDOWS, PAGE_SIZE, PROT_DMA_READ, PROT_DMA_WRITE, DmaWindows
from device.dma.remote import RemoteMemory

__all__ = [
    "MAX_PINNED_PAGES",
    "MAX_PINS",
    "MAX_REPORT",
    "MAX_WINDOWS",
    "PAGE_SIZE",
    "PROT_DMA_READ",
    "PROT_DMA_WRITE",
    "DmaWindows",
    "Pin",
    "PinCounters",
    "PinnedError",
    "RemoteMemory",
]
