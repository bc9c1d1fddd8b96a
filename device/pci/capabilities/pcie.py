"""PCI Express endpoint (PCI Express Base 5.0, 7.5.3)."""

from device.pci.capabilities.base import HEADER, Capability, Host
from device.pci.registers import At, Dword, Register, Word, ro, rw, w1c

SPEED_2_5_GT = 1  # the only speed, one lane: there is no link, but software wants to see one


class ExpressCapabilities(Register, width=16):
    """Version 2 of the structure; port type 0 is an endpoint."""

    VERSION = ro(3, 0, reset=2)
    PORT_TYPE = ro(7, 4, reset=0)
    SLOT = ro(8)
    INTERRUPT_MESSAGE = ro(13, 9)


class DeviceCapabilities(Register, width=32):
    """128-byte payloads: every port above can carry them."""

    MAX_PAYLOAD = ro(2, 0, reset=0)
    PHANTOM_FUNCTIONS = ro(4, 3)
    EXTENDED_TAG = ro(5)
    L0S_LATENCY = ro(8, 6)
    L1_LATENCY = ro(11, 9)
    ROLE_BASED_ERRORS = ro(15, reset=1)
    SLOT_POWER_VALUE = ro(25, 18)
    SLOT_POWER_SCALE = ro(27, 26)
    FUNCTION_LEVEL_RESET = ro(28, reset=1)


class DeviceControl(Register, width=16):
    """INITIATE_RESET reads zero; writing one resets the function before the write is answered (6.6.2)."""

    CORRECTABLE_ERRORS = rw(0)
    NON_FATAL_ERRORS = rw(1)
    FATAL_ERRORS = rw(2)
    UNSUPPORTED_REQUESTS = rw(3)
    RELAXED_ORDERING = rw(4, reset=1)
    MAX_PAYLOAD = rw(7, 5)
    EXTENDED_TAG = ro(8)
    PHANTOM_FUNCTIONS = ro(9)
    AUX_POWER = ro(10)
    NO_SNOOP = rw(11, reset=1)
    MAX_READ_REQUEST = rw(14, 12, reset=2)
    INITIATE_RESET = rw(15)


class DeviceStatus(Register, width=16):
    """TRANSACTIONS_PENDING stays clear: a transaction never outlives the access that began it."""

    CORRECTABLE_ERROR = w1c(0)
    NON_FATAL_ERROR = w1c(1)
    FATAL_ERROR = w1c(2)
    UNSUPPORTED_REQUEST = w1c(3)
    AUX_POWER = ro(4)
    TRANSACTIONS_PENDING = ro(5)


class LinkCapabilities(Register, width=32):
    """One lane at 2.5 GT/s, no power states of the link."""

    MAX_SPEED = ro(3, 0, reset=SPEED_2_5_GT)
    MAX_LANES = ro(9, 4, reset=1)
    ASPM = ro(11, 10)
    PORT_NUMBER = ro(31, 24)


class LinkControl(Register, width=16):
    """What an endpoint's software may set."""

    ASPM = rw(1, 0)
    READ_COMPLETION_BOUNDARY = rw(3)
    COMMON_CLOCK = rw(6)
    EXTENDED_SYNCH = rw(7)


class LinkStatus(Register, width=16):
    """The link as it is."""

    SPEED = ro(3, 0, reset=SPEED_2_5_GT)
    LANES = ro(9, 4, reset=1)
    SLOT_CLOCK = ro(12)


class LinkCapabilities2(Register, width=32):
    """SPEEDS: bit 0 is 2.5 GT/s."""

    SPEEDS = ro(7, 1, reset=1)


class LinkControl2(Register, width=16):
    """The target speed."""

    TARGET_SPEED = rw(3, 0, reset=SPEED_2_5_GT)


class PciExpress(Capability):
    """An endpoint that can be reset by itself. The slot registers of the structure are reserved here.

        31            24 23            16 15             8 7              0
       +----------------+----------------+----------------+----------------+
    00 | CAPABILITIES                    | NEXT           | ID             |
    04 | DEVICE_CAPABILITIES                                               |
    08 | DEVICE_STATUS                   | DEVICE_CONTROL                  |
    0c | LINK_CAPABILITIES                                                 |
    10 | LINK_STATUS                     | LINK_CONTROL                    |
    14 |                                                                   |
    18 |                                                                   |
    1c |                                                                   |
    20 |                                                                   |
    24 | DEVICE_CAPABILITIES_2                                             |
    28 | DEVICE_STATUS_2                 | DEVICE_CONTROL_2                |
    2c | LINK_CAPABILITIES_2                                               |
    30 | LINK_STATUS_2                   | LINK_CONTROL_2                  |
    34 |                                                                   |
    38 |                                                                   |
       +----------------+----------------+----------------+----------------+
    """

    ID = 0x10
    SIZE = 0x3C
    LAYOUT = (
        *HEADER,
        At(0x02, "CAPABILITIES", ExpressCapabilities),
        At(0x04, "DEVICE_CAPABILITIES", DeviceCapabilities),
        At(0x08, "DEVICE_CONTROL", DeviceControl),
        At(0x0A, "DEVICE_STATUS", DeviceStatus),
        At(0x0C, "LINK_CAPABILITIES", LinkCapabilities),
        At(0x10, "LINK_CONTROL", LinkControl),
        At(0x12, "LINK_STATUS", LinkStatus),
        At(0x24, "DEVICE_CAPABILITIES_2", Dword),
        At(0x28, "DEVICE_CONTROL_2", Word),
        At(0x2A, "DEVICE_STATUS_2", Word),
        At(0x2C, "LINK_CAPABILITIES_2", LinkCapabilities2),
        At(0x30, "LINK_CONTROL_2", LinkControl2),
        At(0x32, "LINK_STATUS_2", Word),
    )

    def connect(self, host: Host) -> None:
        """Reset `host` when software asks for it."""
        self._host = host
        host.config.after_write(self.at("DEVICE_CONTROL"), DeviceControl.SIZE, self._written)

    def _written(self, _old: int, new: int) -> None:
        if DeviceControl.INITIATE_RESET.get(new):
            self._host.config.store(
                self.at("DEVICE_CONTROL"), DeviceControl.SIZE, DeviceControl.INITIATE_RESET.put(new, 0)
            )
            self._host.function_level_reset()
