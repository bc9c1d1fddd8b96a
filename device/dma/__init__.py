"""DMA: the windows through which a card reaches its host's memory."""

from device.dma._dirty import MAX_REPORT
from device.dma._windows import MAX_WINDOWS, PAGE_SIZE, PROT_DMA_READ, PROT_DMA_WRITE, DmaWindows
from device.dma.remote import RemoteMemory

__all__ = [
    "MAX_REPORT",
    "MAX_WINDOWS",
    "PAGE_SIZE",
    "PROT_DMA_READ",
    "PROT_DMA_WRITE",
    "DmaWindows",
    "RemoteMemory",
]
