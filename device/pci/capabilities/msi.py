"""Message signalled interrupts (PCI Local Bus 3.0, 6.8.1)."""

from device.pci.capabilities.base import HEADER, Capability, Host
from device.pci.registers import At, Dword, Register, ScratchDword, ScratchWord, ro, rw

MAX_VECTORS = 32


class MsiControl(Register, width=16):
    """MULTIPLE_CAPABLE and MULTIPLE_ENABLE are binary logarithms of vector counts."""

    ENABLE = rw(0)
    MULTIPLE_CAPABLE = ro(3, 1)
    MULTIPLE_ENABLE = rw(6, 4)
    ADDRESS_64 = ro(7, reset=1)
    MASKABLE = ro(8, reset=1)


class MsiAddress(Register, width=32):
    """Where the message goes, a dword address."""

    ADDRESS = rw(31, 2)


class Msi(Capability):
    """1 to 32 vectors, a power of two (else ValueError), with 64-bit addresses and a mask bit each.

        31            24 23            16 15             8 7              0
       +----------------+----------------+----------------+----------------+
    00 | CONTROL                         | NEXT           | ID             |
    04 | ADDRESS                                                           |
    08 | UPPER_ADDRESS                                                     |
    0c |                                 | DATA                            |
    10 | MASK                                                              |
    14 | PENDING                                                           |
       +----------------+----------------+----------------+----------------+
    """

    ID = 0x05
    SIZE = 24
    LAYOUT = (
        *HEADER,
        At(0x02, "CONTROL", MsiControl),
        At(0x04, "ADDRESS", MsiAddress),
        At(0x08, "UPPER_ADDRESS", ScratchDword),
        At(0x0C, "DATA", ScratchWord),
        At(0x10, "MASK", ScratchDword),
        At(0x14, "PENDING", Dword),
    )

    def __init__(self, vectors: int = 1) -> None:
        super().__init__()
        if vectors & (vectors - 1) or not 1 <= vectors <= MAX_VECTORS:
            raise ValueError(f"{vectors} MSI vectors: a function has 1, 2, 4, 8, 16 or 32")
        self.vectors = vectors
        self.resets["CONTROL"] = MsiControl.build(MULTIPLE_CAPABLE=vectors.bit_length() - 1)
        self.writable["MASK"] = (1 << vectors) - 1

    def connect(self, host: Host) -> None:
        """Let the interrupts follow ENABLE and MASK, and PENDING show theirs."""
        self._config = host.config
        self._interrupts = host.interrupts
        host.config.after_write(self.at("CONTROL"), MsiControl.SIZE, self._written)
        host.config.after_write(self.at("MASK"), ScratchDword.SIZE, self._written)
        host.config.before_read(self.at("PENDING"), Dword.SIZE, self._show_pending)

    def _written(self, _old: int, _new: int) -> None:
        self.adopt()

    def adopt(self) -> None:
        """Hand ENABLE and MASK to the interrupts."""
        control = self._config.load(self.at("CONTROL"), MsiControl.SIZE)
        mask = self._config.load(self.at("MASK"), ScratchDword.SIZE)
        self._interrupts.configure_msi(enabled=bool(MsiControl.ENABLE.get(control)), mask=mask)

    def _show_pending(self) -> None:
        self._config.store(self.at("PENDING"), Dword.SIZE, self._interrupts.msi.pending_bits())
