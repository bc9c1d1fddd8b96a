"""MSI: the mask bits in the capability (PCI Local Bus 3.0, 6.8.1)."""

from device.interrupts._bank import VectorBank
from device.interrupts._lines import Lines


class MsiBank(VectorBank):
    """Vectors whose mask bits are one register."""

    def __init__(self, lines: Lines, count: int) -> None:
        super().__init__(lines, count)
        self.mask = 0

    def masked(self, vector: int) -> bool:
        """The vector's bit in the mask register."""
        return bool(self.mask >> vector & 1)

    def configure(self, *, enabled: bool, mask: int) -> None:
        """Follow the capability's registers."""
        self.enabled = enabled
        self.mask = mask
        self.refresh_all()
