"""Where virtio's structures lie (virtio 1.3, 4.1.4)."""

from enum import IntEnum
from typing import ClassVar

from device.pci.bars import LAST_BAR
from device.pci.capabilities.base import HEADER, Capability, Host
from device.pci.registers import At, Byte, Dword, ScratchByte, ScratchDword


class VirtioCfgType(IntEnum):
    """The structure that a capability locates."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_CFG = 5


class VirtioCapability(Capability):
    """`length` bytes at `offset` of `bar` hold the structure `cfg_type`.

         31            24 23            16 15             8 7              0
        +----------------+----------------+----------------+----------------+
     00 | CFG_TYPE       | CAP_LENGTH     | NEXT           | ID             |
     04 |                                 | STRUCTURE_ID   | BAR            |
     08 | OFFSET                                                            |
     0c | LENGTH                                                            |
        +----------------+----------------+----------------+----------------+

    ValueError when the function has no such bytes.
    """

    ID = 0x09
    SIZE = 16
    LAYOUT: ClassVar[tuple[At, ...]] = (
        *HEADER,
        At(0x02, "CAP_LENGTH", Byte),
        At(0x03, "CFG_TYPE", Byte),
        At(0x04, "BAR", Byte),
        At(0x05, "STRUCTURE_ID", Byte),
        At(0x08, "OFFSET", Dword),
        At(0x0C, "LENGTH", Dword),
    )

    def __init__(self, cfg_type: VirtioCfgType, bar: int, offset: int, length: int) -> None:
        super().__init__()
        if not 0 <= bar <= LAST_BAR or offset < 0 or length < 0:
            raise ValueError(f"{cfg_type.name}: there is nothing at {offset:#x} of BAR {bar}")
        self.cfg_type, self.bar, self.structure_offset, self.length = cfg_type, bar, offset, length
        self.resets |= {
            "CAP_LENGTH": self.SIZE,
            "CFG_TYPE": cfg_type,
            "BAR": bar,
            "OFFSET": offset,
            "LENGTH": length,
        }

    def connect(self, host: Host) -> None:
        """Check that the structure lies in one of the function's BARs."""
        bar = host.bars.get(self.bar)
        if bar is None or self.structure_offset + self.length > bar.size:
            raise ValueError(f"{self.cfg_type.name}: BAR {self.bar} has no {self.length:#x} bytes there")


class VirtioNotify(VirtioCapability):
    """The doorbells: queue n's lies at `offset` + queue_notify_off * `multiplier`.

         31            24 23            16 15             8 7              0
        +----------------+----------------+----------------+----------------+
     00 | CFG_TYPE       | CAP_LENGTH     | NEXT           | ID             |
     04 |                                 | STRUCTURE_ID   | BAR            |
     08 | OFFSET                                                            |
     0c | LENGTH                                                            |
     10 | MULTIPLIER                                                        |
        +----------------+----------------+----------------+----------------+

    ValueError for a multiplier that is neither 0 nor an even power of two (4.1.4.4.1).
    """

    SIZE = 20
    LAYOUT: ClassVar[tuple[At, ...]] = (*VirtioCapability.LAYOUT, At(0x10, "MULTIPLIER", Dword))

    def __init__(self, bar: int, offset: int, length: int, multiplier: int) -> None:
        if multiplier and (multiplier & (multiplier - 1) or multiplier < 2):
            raise ValueError(f"notify multiplier {multiplier}: it must be 0 or an even power of two")
        super().__init__(VirtioCfgType.NOTIFY, bar, offset, length)
        self.resets["MULTIPLIER"] = multiplier


class VirtioPciCfgAccess(Capability):
    """A window into the BARs for software that cannot map them (4.1.4.9).

    Software sets BAR, OFFSET and LENGTH (1, 2 or 4); an access to DATA then becomes one access of LENGTH
    bytes there. A window that is misaligned, or no part of a BAR, passes nothing on.

         31            24 23            16 15             8 7              0
        +----------------+----------------+----------------+----------------+
     00 | CFG_TYPE       | CAP_LENGTH     | NEXT           | ID             |
     04 |                                 | STRUCTURE_ID   | BAR            |
     08 | OFFSET                                                            |
     0c | LENGTH                                                            |
     10 | DATA                                                              |
        +----------------+----------------+----------------+----------------+
    """

    ID = 0x09
    SIZE = 20
    LAYOUT = (
        *HEADER,
        At(0x02, "CAP_LENGTH", Byte),
        At(0x03, "CFG_TYPE", Byte),
        At(0x04, "BAR", ScratchByte),
        At(0x05, "STRUCTURE_ID", Byte),
        At(0x08, "OFFSET", ScratchDword),
        At(0x0C, "LENGTH", ScratchDword),
        At(0x10, "DATA", ScratchDword),
    )

    def __init__(self) -> None:
        super().__init__()
        self.resets |= {"CAP_LENGTH": self.SIZE, "CFG_TYPE": VirtioCfgType.PCI_CFG}

    def connect(self, host: Host) -> None:
        """Pass accesses to DATA on to the BARs of `host`."""
        self._host = host
        host.config.before_read(self.at("DATA"), ScratchDword.SIZE, self._fetch)
        host.config.after_write(self.at("DATA"), ScratchDword.SIZE, self._pass_on)

    def _window(self) -> tuple[int, int, int] | None:
        """BAR, offset and length, if accesses can be passed on."""
        config = self._host.config
        index = config.load(self.at("BAR"), 1)
        offset = config.load(self.at("OFFSET"), 4)
        length = config.load(self.at("LENGTH"), 4)
        bar = self._host.bars.get(index)
        if bar is None or length not in (1, 2, 4) or offset % length or offset + length > bar.size:
            return None
        return index, offset, length

    def _fetch(self) -> None:
        window = self._window()
        if window:
            index, offset, length = window
            data = self._host.region_accesses(index).read(offset, length)
            self._host.config.store(self.at("DATA"), length, int.from_bytes(data, "little"))

    def _pass_on(self, _old: int, new: int) -> None:
        window = self._window()
        if window:
            index, offset, length = window
            self._host.region_accesses(index).write(offset, new.to_bytes(4, "little")[:length])
