"""Configuration space of a PCI Express endpoint (PCI Local Bus 3.0, 6.1; PCI Express Base 5.0, 7.5)."""

from collections.abc import Iterable
from typing import ClassVar, Protocol

from device.identity import Identity
from device.pci.bars import BarKind
from device.pci.register_file import RegisterFile
from device.pci.registers import At, Byte, Dword, Register, ScratchByte, Word, ro, rw, w1c

CONFIG_SIZE = 4096  # conventional 256 bytes and the extended space behind them
HEADER_SIZE = 0x40
CAPABILITIES_END = 0x100  # where extended space begins; a zero dword there says that its list is empty


class Command(Register, width=16):
    """What software lets the function do.

    The bits that PCI Express hardwires to zero, and I/O decoding, are not there.
    """

    MEMORY = rw(1)
    BUS_MASTER = rw(2)
    PARITY = rw(6)
    SERR = rw(8)
    INTX_DISABLE = rw(10)


class Status(Register, width=16):
    """What happened; INTERRUPT is the level of INTx, whether disabled or not."""

    INTERRUPT = ro(3)
    CAPABILITIES_LIST = ro(4, reset=1)
    MASTER_PARITY_ERROR = w1c(8)
    SIGNALED_TARGET_ABORT = w1c(11)
    RECEIVED_TARGET_ABORT = w1c(12)
    RECEIVED_MASTER_ABORT = w1c(13)
    SIGNALED_SYSTEM_ERROR = w1c(14)
    PARITY_ERROR = w1c(15)


class ClassCode(Register, width=24):
    """Base class, subclass, programming interface."""

    INTERFACE = ro(7, 0)
    SUBCLASS = ro(15, 8)
    BASE = ro(23, 16)


class BaseAddress(Register, width=32):
    """A memory BAR. The address bits below the BAR's size are read only zero.

    Reading back all ones tells the size.
    """

    IO_SPACE = ro(0)
    TYPE = ro(2, 1)
    PREFETCHABLE = ro(3)
    ADDRESS = rw(31, 4)


class UpperAddress(Register, width=32):
    """The upper half of a 64-bit BAR."""

    ADDRESS = rw(31, 0)


class BarShape(Protocol):
    """What configuration space needs to know of a BAR."""

    index: int
    size: int
    kind: BarKind
    prefetchable: bool


class ConfigSpace(RegisterFile):
    """4096 bytes: a type 0 header, room for capabilities, an empty extended space.

         31            24 23            16 15             8 7              0
        +----------------+----------------+----------------+----------------+
     00 | DEVICE_ID                       | VENDOR_ID                       |
     04 | STATUS                          | COMMAND                         |
     08 | CLASS_CODE                                       | REVISION       |
     0c | BIST           | HEADER_TYPE    | LATENCY        | CACHE_LINE     |
     10 | BAR0                                                              |
     14 | BAR1                                                              |
     18 | BAR2                                                              |
     1c | BAR3                                                              |
     20 | BAR4                                                              |
     24 | BAR5                                                              |
     28 | CARDBUS_CIS                                                       |
     2c | SUBSYSTEM_ID                    | SUBSYSTEM_VENDOR_ID             |
     30 | EXPANSION_ROM                                                     |
     34 |                                                  | CAPABILITIES   |
     38 |                                                                   |
     3c | MAX_LAT        | MIN_GNT        | INTERRUPT_PIN  | INTERRUPT_LINE |
        +----------------+----------------+----------------+----------------+

    ValueError for BARs that share a slot, or an interrupt pin outside 0 (none) to 4 (INTD).
    """

    LAYOUT = (
        At(0x00, "VENDOR_ID", Word),
        At(0x02, "DEVICE_ID", Word),
        At(0x04, "COMMAND", Command),
        At(0x06, "STATUS", Status),
        At(0x08, "REVISION", Byte),
        At(0x09, "CLASS_CODE", ClassCode),
        At(0x0C, "CACHE_LINE", ScratchByte),
        At(0x0D, "LATENCY", Byte),
        At(0x0E, "HEADER_TYPE", Byte),
        At(0x0F, "BIST", Byte),
        *(At(0x10 + 4 * index, f"BAR{index}", BaseAddress) for index in range(6)),
        At(0x28, "CARDBUS_CIS", Dword),
        At(0x2C, "SUBSYSTEM_VENDOR_ID", Word),
        At(0x2E, "SUBSYSTEM_ID", Word),
        At(0x30, "EXPANSION_ROM", Dword),
        At(0x34, "CAPABILITIES", Byte),
        At(0x3C, "INTERRUPT_LINE", ScratchByte),
        At(0x3D, "INTERRUPT_PIN", Byte),
        At(0x3E, "MIN_GNT", Byte),
        At(0x3F, "MAX_LAT", Byte),
    )
    OFFSETS: ClassVar[dict[str, int]] = {at.name: at.offset for at in LAYOUT}

    COMMAND = OFFSETS["COMMAND"]
    STATUS = OFFSETS["STATUS"]

    def __init__(
        self,
        identity: Identity,
        bars: Iterable[BarShape] = (),
        *,
        interrupt_pin: int = 1,
        first_capability: int = 0,
    ) -> None:
        super().__init__(CONFIG_SIZE)
        if not 0 <= interrupt_pin <= 4:
            raise ValueError(f"interrupt pin {interrupt_pin}: 0 is none, 1 to 4 are INTA to INTD")
        resets = {
            "VENDOR_ID": identity.vendor,
            "DEVICE_ID": identity.device,
            "REVISION": identity.revision,
            "CLASS_CODE": identity.class_code,
            "SUBSYSTEM_VENDOR_ID": identity.subsystem_vendor,
            "SUBSYSTEM_ID": identity.subsystem,
            "INTERRUPT_PIN": interrupt_pin,
            "CAPABILITIES": first_capability,
            "STATUS": Status.build(CAPABILITIES_LIST=bool(first_capability)),
        }
        for at in self.LAYOUT:
            if not at.name.startswith("BAR"):
                self.place(at.offset, at.register, reset=resets.get(at.name))
        for bar in bars:
            self._place_bar(bar)

    def _place_bar(self, bar: BarShape) -> None:
        offset = self.OFFSETS[f"BAR{bar.index}"]
        address = -bar.size & (1 << 64) - 1
        low = BaseAddress.build(TYPE=bar.kind.value, PREFETCHABLE=bar.prefetchable)
        self.place(offset, BaseAddress, reset=low, writable=address & BaseAddress.WRITABLE)
        if bar.kind is BarKind.MEM64:
            self.place(offset + 4, UpperAddress, writable=address >> 32)

    @property
    def command(self) -> int:
        """The COMMAND register."""
        return self.load(self.COMMAND, Command.SIZE)
