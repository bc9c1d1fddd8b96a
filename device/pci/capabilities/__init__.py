"""The structures of a function's capability list."""

from device.pci.capabilities.base import Capability
from device.pci.capabilities.msi import Msi
from device.pci.capabilities.msix import Msix
from device.pci.capabilities.pcie import PciExpress
from device.pci.capabilities.pm import PowerManagement
from device.pci.capabilities.virtio import VirtioCapability, VirtioCfgType, VirtioNotify, VirtioPciCfgAccess

__all__ = [
    "Capability",
    "Msi",
    "Msix",
    "PciExpress",
    "PowerManagement",
    "VirtioCapability",
    "VirtioCfgType",
    "VirtioNotify",
    "VirtioPciCfgAccess",
]
