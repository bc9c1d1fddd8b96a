"""The interrupt indexes of a vfio PCI device, as linux/vfio.h numbers them."""

from dataclasses import dataclass
from enum import IntEnum, IntFlag


class IrqKind(IntEnum):
    """Index of an interrupt (VFIO_PCI_*_IRQ_INDEX). The first three exclude each other."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqFlags(IntFlag):
    """What an index can do (VFIO_IRQ_INFO_*)."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


@dataclass(frozen=True, slots=True)
class IrqIndex:
    """`count` interrupts of one kind; 0 when the function has none."""

    count: int
    flags: IrqFlags
