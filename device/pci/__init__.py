"""A PCI function's registers, declared as data."""

from device.identity import Identity
from device.pci.bars import Bar, BarKind, Handler
from device.pci.config_space import CONFIG_SIZE, Command, ConfigSpace, Status
from device.pci.memory_bar import MemoryBar

__all__ = [
    "CONFIG_SIZE",
    "Bar",
    "BarKind",
    "Command",
    "ConfigSpace",
    "Handler",
    "Identity",
    "MemoryBar",
    "Status",
]
