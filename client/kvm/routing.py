"""Where a VM's interrupt inputs (GSIs) lead: KVM_SET_GSI_ROUTING's entries as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from client.kvm import _abi
from client.kvm._abi import Chip as Chip

_MSI_ADDRESS: Final = 0xFEE0_0000
_MSI_DESTINATION_SHIFT: Final = 12
_MSI_LEVEL: Final = 1 << 15 | 1 << 14  # trigger mode level, and its level asserted


@dataclass(frozen=True, slots=True)
class IrqchipRoute:
    """GSI `gsi` is input `pin` of a part of the irqchip in the kernel."""

    gsi: int
    chip: Chip
    pin: int

    def entry(self) -> _abi.RoutingEntry:
        """As KVM takes it."""
        return _abi.RoutingEntry(gsi=self.gsi, type=_abi.ROUTE_IRQCHIP, u=(self.chip, self.pin))


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """GSI `gsi` interrupts local APIC `destination` with `vector` (Intel SDM volume 3, 11.11).

    With `level` the end of interrupt is told to user space as that of an I/O APIC's input.
    """

    gsi: int
    vector: int
    destination: int = 0
    level: bool = False

    @property
    def address(self) -> int:
        """The message's address."""
        return _MSI_ADDRESS | self.destination << _MSI_DESTINATION_SHIFT

    @property
    def data(self) -> int:
        """The message's data."""
        return self.vector | (_MSI_LEVEL if self.level else 0)

    def entry(self) -> _abi.RoutingEntry:
        """As KVM takes it."""
        return _abi.RoutingEntry(gsi=self.gsi, type=_abi.ROUTE_MSI, u=(self.address, 0, self.data))


Route = IrqchipRoute | MsiRoute
