"""Numbers and flags that vfio-user takes over from the kernel (linux/vfio.h, linux/vfio's PCI part)."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class DeviceFlags(IntFlag):
    """VFIO_DEVICE_FLAGS_*: what kind of device answers."""

    RESET = 1 << 0
    PCI = 1 << 1


class RegionFlags(IntFlag):
    """VFIO_REGION_INFO_FLAG_*."""

    READ = 1 << 0
    WRITE = 1 << 1
    MMAP = 1 << 2
    CAPS = 1 << 3


class IrqInfoFlags(IntFlag):
    """VFIO_IRQ_INFO_*."""

    EVENTFD = 1 << 0
    MASKABLE = 1 << 1
    AUTOMASKED = 1 << 2
    NORESIZE = 1 << 3


class IrqSetFlags(IntFlag):
    """VFIO_IRQ_SET_*: exactly one DATA and one ACTION flag makes a valid request."""

    DATA_NONE = 1 << 0
    DATA_BOOL = 1 << 1
    DATA_EVENTFD = 1 << 2
    ACTION_MASK = 1 << 3
    ACTION_UNMASK = 1 << 4
    ACTION_TRIGGER = 1 << 5


IRQ_SET_DATA = IrqSetFlags.DATA_NONE | IrqSetFlags.DATA_BOOL | IrqSetFlags.DATA_EVENTFD
IRQ_SET_ACTION = IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER


class DmaMapFlags(IntFlag):
    """What the device may do in a DMA window (VFIO_DMA_MAP_FLAG_READ and _WRITE)."""

    READ = 1 << 0
    WRITE = 1 << 1


class DmaUnmapFlags(IntFlag):
    """VFIO_DMA_UNMAP_FLAG_*; the spec's text calls the field unused, QEMU sends ALL."""

    GET_DIRTY_BITMAP = 1 << 0
    ALL = 1 << 1


class RegionIndex(IntEnum):
    """VFIO_PCI_*_REGION_INDEX."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class IrqIndex(IntEnum):
    """VFIO_PCI_*_IRQ_INDEX."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class RegionCapability(IntEnum):
    """VFIO_REGION_INFO_CAP_*: ids in a region's capability chain."""

    SPARSE_MMAP = 1
    TYPE = 2
    MSIX_MAPPABLE = 3
