"""Who a PCI function is."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """What configuration space says first. `class_code` is 24 bits, 0x020000 is an Ethernet controller.

    `revision` is 1 for modern virtio (virtio 1.3, 4.1.2).
    """

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    revision: int = 1
    class_code: int = 0x020000
