"""Where a PCI interrupt pin ends: an input of the machine's irqchip, or nowhere (QEMU's PCIINTxRoute).

A pin is wired to one of four lines of the root bus, and each line has a route that the machine's firmware or
its operating system may change at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from client.errors import ClientError

LINES: Final = 4
"""INTA to INTD of the root bus (PCI Local Bus 3.0, 2.2.6)."""


class IntxMode(Enum):
    """What a route does with the level of its line."""

    DISABLED = "disabled"
    """Nobody listens."""
    ENABLED = "enabled"
    """The input has the line's level."""
    INVERTED = "inverted"
    """The input has the opposite of the line's level, as a bridge with an active-low output makes it."""


@dataclass(frozen=True, slots=True)
class IntxRoute:
    """Where a line goes: to input `gsi` of the irqchip (global system interrupt), unless DISABLED."""

    mode: IntxMode
    gsi: int = -1

    def __post_init__(self) -> None:
        if self.mode is not IntxMode.DISABLED and self.gsi < 0:
            raise ClientError(f"a route that is {self.mode.value} needs an input, not {self.gsi}")


NOWHERE: Final = IntxRoute(IntxMode.DISABLED)


def root_line(slot: int, pin: int) -> int:
    """The line of the root bus, 0 for INTA, that interrupt pin 1 to 4 (INTA to INTD) of a device in `slot` is
    wired to.

    Slots are swizzled, so that devices which all use INTA are spread (PCI-to-PCI Bridge 1.2, 9.1). Raises
    ClientError for a pin that is none.
    """
    if not 1 <= pin <= LINES:
        raise ClientError(f"interrupt pin {pin}: 1 to {LINES} are INTA to INTD")
    return (slot + pin - 1) % LINES
