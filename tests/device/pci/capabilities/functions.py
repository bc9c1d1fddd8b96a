"""Functions with just the capabilities a test is about, and their configuration space by register name."""

from collections.abc import Iterable

from device.function import Bar, Identity, MemoryBar, PciFunction, RegionIndex
from device.pci.capabilities import Capability

IDENTITY = Identity(0x1AF4, 0x1041, 0x8086, 0x001A)


def a_function(*capabilities: Capability, bars: Iterable[Bar | MemoryBar] = ()) -> PciFunction:
    """A function named after nobody."""
    return PciFunction("test", IDENTITY, bars=bars, capabilities=capabilities)


def get(function: PciFunction, capability: Capability, register: str) -> int:
    """Read a whole register over the bus."""
    size = next(at.register.SIZE for at in capability.LAYOUT if at.name == register)
    return int.from_bytes(function.region_read(RegionIndex.CONFIG, capability.at(register), size), "little")


def put(function: PciFunction, capability: Capability, register: str, value: int) -> None:
    """Write a whole register over the bus."""
    size = next(at.register.SIZE for at in capability.LAYOUT if at.name == register)
    function.region_write(RegionIndex.CONFIG, capability.at(register), value.to_bytes(size, "little"))
