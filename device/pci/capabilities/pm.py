"""Power management (PCI Bus Power Management Interface 1.2, 3.2)."""

from device.pci.capabilities.base import HEADER, Capability, Host
from device.pci.registers import At, Register, Word, ro, rw

D0 = 0
D3_HOT = 3


class PmCapabilities(Register, width=16):
    """Version 3 of the interface; no D1, no D2, no power management events."""

    VERSION = ro(2, 0, reset=3)
    D1 = ro(9)
    D2 = ro(10)
    PME_SUPPORT = ro(15, 11)


class PmControl(Register, width=16):
    """NO_SOFT_RESET: the way back from D3hot to D0 keeps all state."""

    POWER_STATE = rw(1, 0)
    NO_SOFT_RESET = ro(3, reset=1)


class PowerManagement(Capability):
    """D0 and D3hot; writing a state that the function does not have changes nothing (3.2.4).

        31            24 23            16 15             8 7              0
       +----------------+----------------+----------------+----------------+
    00 | CAPABILITIES                    | NEXT           | ID             |
    04 | DATA                            | CONTROL                         |
       +----------------+----------------+----------------+----------------+
    """

    ID = 0x01
    SIZE = 8
    LAYOUT = (
        *HEADER,
        At(0x02, "CAPABILITIES", PmCapabilities),
        At(0x04, "CONTROL", PmControl),
        At(0x06, "DATA", Word),
    )

    def connect(self, host: Host) -> None:
        """Follow writes to the power state."""
        self._config = host.config
        host.config.after_write(self.at("CONTROL"), PmControl.SIZE, self._written)

    def _written(self, old: int, new: int) -> None:
        if PmControl.POWER_STATE.get(new) not in (D0, D3_HOT):
            kept = PmControl.POWER_STATE.put(new, PmControl.POWER_STATE.get(old))
            self._config.store(self.at("CONTROL"), PmControl.SIZE, kept)

    @property
    def power_state(self) -> int:
        """D0 or D3_HOT."""
        return PmControl.POWER_STATE.get(self._config.load(self.at("CONTROL"), PmControl.SIZE))
