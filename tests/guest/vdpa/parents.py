"""The kernel's two vDPA parents that drive the card, as data, and the shell lines that set them up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from device.profiles import C5000X, N3000, VIRTIO

VDPA: Final = "vdpa0"
"""The vDPA device's name."""

ADD: Final = f"vdpa dev add name {VDPA} mgmtdev $mgmt"
"""Make the vDPA device of the card that `Parent.take` took."""

ADDRESSES: Final = """
dev=$(nic)
ip addr add 10.77.0.2/24 dev $dev
ip -6 addr add fd77::2/64 dev $dev nodad
bring_up $dev
"""
"""Put addresses onto the interface that the guest has by the card now: ``$dev``."""


@dataclass(frozen=True, slots=True)
class Parent:
    """One parent: the driver of a PCI function that offers it to the vDPA bus (drivers/vdpa in Linux)."""

    module: str
    driver: str
    """Its name on the PCI bus, which is what `give` wants."""
    profiles: tuple[str, ...]
    """Those of the card that it takes."""

    def take(self, card: int = 0) -> str:
        """Have it take the guest's card of this number; ``$mgmt`` is that card for the tool `vdpa`."""
        return f"""
modprobe {self.module}
give {self.driver} $(card {card})
mgmt=pci/$(basename $(card {card}))
"""

    def up(self, card: int = 0) -> str:
        """Have it take the card, and virtio_vdpa and virtio_net make an interface with addresses of it."""
        return f"""
modprobe virtio_vdpa
modprobe virtio_net
{self.take(card)}
{ADD}
{ADDRESSES}
"""

    def __str__(self) -> str:
        return self.module


IFCVF: Final = Parent("ifcvf", "ifcvf", (N3000.name, C5000X.name))

VP_VDPA: Final = Parent("vp_vdpa", "vp-vdpa", (N3000.name, C5000X.name, VIRTIO.name))

PARENTS: Final = (IFCVF, VP_VDPA)
