"""Numbers and flags that vfio-user takes over from the kernel (linux/vfio.h, linux/vfio's PCI part)."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final


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
    """VFIO_DMA_UNMAP_FLAG_*; the spec's text calls the field unused, QEMU sends ALL, libvfio-user takes
    both.
    """

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


class IoFdType(IntEnum):
    """VFIO_USER_IO_FD_TYPE_*: how a sub-region's descriptor is told of an access."""

    IOEVENTFD = 0
    IOREGIONFD = 1


class IoEventFdFlags(IntFlag):
    """KVM_IOEVENTFD_FLAG_* (linux/kvm.h)."""

    DATAMATCH = 1 << 0
    PIO = 1 << 1
    DEASSIGN = 1 << 2
    VIRTIO_CCW_NOTIFY = 1 << 3


class IoRegionFdFlags(IntFlag):
    """KVM_IOREGION_*: of a kernel series that was never merged, as the spec names them."""

    PIO = 1 << 0
    POSTED_WRITES = 1 << 1


FEATURE_MASK: Final = 0xFFFF
"""VFIO_DEVICE_FEATURE_MASK: the bits of DEVICE_FEATURE's flags that are a `Feature`."""


class FeatureFlags(IntFlag):
    """VFIO_DEVICE_FEATURE_*: what to do with the feature whose number is in `FEATURE_MASK`."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


class Feature(IntEnum):
    """VFIO_DEVICE_FEATURE_*: those that vfio-user has (spec, "Device Features"), and DMA_BUF, which only the
    kernel has.
    """

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8
    DMA_BUF = 11


class MigrationFlags(IntFlag):
    """VFIO_MIGRATION_*: which states a device has beyond RUNNING and ERROR."""

    STOP_COPY = 1 << 0
    P2P = 1 << 1
    PRE_COPY = 1 << 2


class DeviceState(IntEnum):
    """VFIO_DEVICE_STATE_* (enum vfio_device_mig_state); the two with P2P are not used in vfio-user."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7
