"""A PCI function's configuration space, read once and decoded as data (PCI Local Bus 3.0, PCI Express Base
6).

`read_config` takes the snapshot, `ConfigSpace` decodes it without I/O, and `PciControl` sets the few bits
that a driver sets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cached_property
from typing import TYPE_CHECKING, Final

from client.errors import DeviceError
from protocol.vfio import RegionIndex

if TYPE_CHECKING:
    from client.session import Session

HEADER_SIZE: Final = 64
CONVENTIONAL_SIZE: Final = 256
EXTENDED_SIZE: Final = 4096

MAX_CAPABILITIES: Final = 48
"""What 192 bytes after the header have room for, 4 bytes each; a longer list is a loop."""

MAX_EXTENDED_CAPABILITIES: Final = (EXTENDED_SIZE - CONVENTIONAL_SIZE) // 4


class Command(IntFlag):
    """The command register's bits."""

    IO = 1 << 0
    MEMORY = 1 << 1
    MASTER = 1 << 2
    PARITY = 1 << 6
    SERR = 1 << 8
    INTX_DISABLE = 1 << 10


class CapabilityId(IntEnum):
    """Ids in the list of capabilities, those that a network card may have."""

    PM = 0x01
    VPD = 0x03
    MSI = 0x05
    VENDOR = 0x09
    PCIE = 0x10
    MSIX = 0x11
    AF = 0x13


class ExtendedCapabilityId(IntEnum):
    """Ids in the list of extended capabilities."""

    AER = 0x0001
    DSN = 0x0003
    VENDOR = 0x000B
    ACS = 0x000D
    ARI = 0x000E
    SRIOV = 0x0010
    PASID = 0x001B


@dataclass(frozen=True, slots=True)
class BarRegister:
    """What a BAR register says of itself; its size is the region's. `index` of a 64-bit BAR is that of its
    lower half.
    """

    index: int
    io: bool
    is_64bit: bool
    prefetchable: bool
    address: int


@dataclass(frozen=True, slots=True)
class CapabilityEntry:
    """A capability: its id, where it begins, and its bytes up to what follows it in the space."""

    id: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class MsixCapability:
    """MSI-X: where control is in the space, how many vectors, and where table and PBA lie, as (BAR,
    offset).
    """

    offset: int
    vectors: int
    enabled: bool
    masked: bool
    table: tuple[int, int]
    pba: tuple[int, int]


@dataclass(frozen=True, slots=True)
class VirtioCapability:
    """Where a virtio structure lies (virtio 1.3, 4.1.4): `multiplier` is that of notify, 0 elsewhere."""

    kind: int
    bar: int
    id: int
    offset: int
    length: int
    multiplier: int
    config_offset: int


class ConfigSpace:
    """A snapshot of 256 or 4096 bytes. Raises DeviceError for fewer than a header."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) < CONVENTIONAL_SIZE:
            raise DeviceError(f"configuration space has {len(raw)} bytes, not {CONVENTIONAL_SIZE}")
        self.raw = raw

    def u8(self, offset: int) -> int:
        """A byte."""
        return self.raw[offset]

    def u16(self, offset: int) -> int:
        """A little-endian 16-bit number."""
        return int(struct.unpack_from("<H", self.raw, offset)[0])

    def u32(self, offset: int) -> int:
        """A little-endian 32-bit number."""
        return int(struct.unpack_from("<I", self.raw, offset)[0])

    @property
    def vendor(self) -> int:
        """Vendor id."""
        return self.u16(0x00)

    @property
    def device(self) -> int:
        """Device id."""
        return self.u16(0x02)

    @property
    def command(self) -> Command:
        """The command register."""
        return Command(self.u16(0x04))

    @property
    def status(self) -> int:
        """The status register."""
        return self.u16(0x06)

    @property
    def revision(self) -> int:
        """Revision id."""
        return self.u8(0x08)

    @property
    def class_code(self) -> int:
        """Base class, subclass and interface as one 24-bit number: 0x020000 is an Ethernet controller."""
        return self.u32(0x08) >> 8

    @property
    def header_type(self) -> int:
        """0 for a function with BARs like ours; bit 7, of a device with more functions, is taken off."""
        return self.u8(0x0E) & 0x7F

    @property
    def subsystem(self) -> tuple[int, int]:
        """Subsystem vendor and id."""
        return self.u16(0x2C), self.u16(0x2E)

    @property
    def interrupt_pin(self) -> int:
        """0 without INTx, 1 for INTA."""
        return self.u8(0x3D)

    @cached_property
    def bars(self) -> tuple[BarRegister, ...]:
        """The BAR registers; the upper half of a 64-bit one is no BAR of its own."""
        return tuple(self._walk_bars())

    def _walk_bars(self) -> Iterator[BarRegister]:
        index = 0
        while index < 6:
            low = self.u32(0x10 + 4 * index)
            if low & 1:
                yield BarRegister(index, True, False, False, low & ~0x3)
                index += 1
                continue
            wide = low & 0x6 == 0x4 and index < 5
            high = self.u32(0x14 + 4 * index) if wide else 0
            yield BarRegister(index, False, wide, bool(low & 0x8), high << 32 | low & ~0xF)
            index += 2 if wide else 1

    @cached_property
    def capabilities(self) -> tuple[CapabilityEntry, ...]:
        """The list of capabilities in its own order; raises DeviceError if it loops or leaves the space."""
        if not self.status & 1 << 4:
            return ()
        starts: list[int] = []
        at = self.u8(0x34) & ~3
        while at:
            if at < HEADER_SIZE or at in starts or len(starts) == MAX_CAPABILITIES:
                raise DeviceError(f"the capability list goes to {at:#x} after {len(starts)} capabilities")
            starts.append(at)
            at = self.u8(at + 1) & ~3
        return tuple(
            CapabilityEntry(self.u8(start), start, self._until_next(start, starts)) for start in starts
        )

    @cached_property
    def extended_capabilities(self) -> tuple[CapabilityEntry, ...]:
        """The list of extended capabilities; empty in a conventional space. Raises DeviceError as
        `capabilities` does.
        """
        if len(self.raw) < EXTENDED_SIZE:
            return ()
        starts: list[int] = []
        at = CONVENTIONAL_SIZE
        while at:
            header = self.u32(at)
            if header in (0, 0xFFFF_FFFF) and not starts:
                return ()
            starts.append(at)
            at = header >> 20 & ~3
            if at and (at < CONVENTIONAL_SIZE or at in starts or len(starts) > MAX_EXTENDED_CAPABILITIES):
                raise DeviceError(
                    f"the extended capability list goes to {at:#x} after {len(starts)} capabilities"
                )
        return tuple(
            CapabilityEntry(self.u16(start), start, self._until_next(start, starts, EXTENDED_SIZE))
            for start in starts
        )

    def _until_next(self, start: int, starts: list[int], end: int = CONVENTIONAL_SIZE) -> bytes:
        return self.raw[start : min((other for other in starts if other > start), default=end)]

    def find(self, capability: int) -> CapabilityEntry | None:
        """The first capability with this id."""
        return next((entry for entry in self.capabilities if entry.id == capability), None)

    @cached_property
    def msix(self) -> MsixCapability | None:
        """The MSI-X capability; raises DeviceError if it is cut short."""
        entry = self.find(CapabilityId.MSIX)
        if entry is None:
            return None
        if len(entry.data) < 12:
            raise DeviceError("the MSI-X capability is cut short")
        control, table, pba = struct.unpack_from("<HII", entry.data, 2)
        return MsixCapability(
            offset=entry.offset,
            vectors=(control & 0x7FF) + 1,
            enabled=bool(control & 1 << 15),
            masked=bool(control & 1 << 14),
            table=(table & 7, table & ~7),
            pba=(pba & 7, pba & ~7),
        )

    @cached_property
    def virtio(self) -> tuple[VirtioCapability, ...]:
        """The virtio structures in the order of their capabilities; raises DeviceError for one that is cut
        short.
        """
        found = []
        for entry in self.capabilities:
            if entry.id != CapabilityId.VENDOR:
                continue
            if len(entry.data) < 16 or entry.data[2] < 16:
                raise DeviceError(f"the virtio capability at {entry.offset:#x} is cut short")
            kind, bar, id_ = entry.data[3:6]
            offset, length = struct.unpack_from("<II", entry.data, 8)
            wide = len(entry.data) >= 20 and entry.data[2] >= 20
            multiplier = struct.unpack_from("<I", entry.data, 16)[0] if wide else 0
            found.append(VirtioCapability(kind, bar, id_, offset, length, multiplier, entry.offset))
        return tuple(found)


async def read_config(session: Session) -> ConfigSpace:
    """A snapshot of the whole configuration space; raises DeviceError if the device has none."""
    index = RegionIndex.CONFIG
    size = session.regions[index].size if index < len(session.regions) else 0
    if size == 0:
        raise DeviceError("the device has no configuration space")
    config = ConfigSpace(await session.region_read(index, 0, min(size, EXTENDED_SIZE)))
    session.decoding.learn(config)
    return config


class PciControl:
    """Sets the bits of configuration space that a driver sets."""

    def __init__(self, session: Session, config: ConfigSpace) -> None:
        self.session = session
        self.config = config
        self._command = config.command

    async def set_command(self, bits: Command, *, on: bool = True) -> None:
        """Set or clear bits of the command register, leaving the others."""
        self._command = self._command | bits if on else Command(int(self._command) & ~int(bits))
        await self._write16(0x04, int(self._command))

    async def set_msix(self, *, enabled: bool, masked: bool = False) -> None:
        """Set the enable and the function mask bit of MSI-X; raises DeviceError if the device has none."""
        msix = self.config.msix
        if msix is None:
            raise DeviceError("the device has no MSI-X")
        await self._write16(msix.offset + 2, enabled << 15 | masked << 14)

    async def _write16(self, offset: int, value: int) -> None:
        await self.session.region_write(RegionIndex.CONFIG, offset, struct.pack("<H", value))
