"""The device that a client is watched with: small, but with one of everything that a client may meet."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from errno import EINVAL
from typing import Final

from conformance._device import BUS_MASTER, COMMAND
from conformance._memory import PAGE
from protocol.messages import IrqInfo
from protocol.vfio import IrqIndex, IrqInfoFlags, RegionFlags, RegionIndex

VECTORS: Final = 4
REGISTERS: Final = PAGE
MEMORY: Final = 16 * PAGE
SPARSE: Final = 64 * PAGE

AREAS: Final = tuple((page * PAGE, PAGE) for page in range(0, 64, 2))
"""Every other page: a chain too long for the first question of any known client."""

CONFIG_SIZE: Final = 256

_ABSENT: Final = RegionFlags(0)
_BOTH: Final = RegionFlags.READ | RegionFlags.WRITE


class RefusedError(Exception):
    """What the device refuses, with an errno."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


@dataclass(frozen=True, slots=True)
class Region:
    """A region: bytes that a message reads and writes; `fd` and `areas` if it can be mapped."""

    length: int = 0
    flags: RegionFlags = _ABSENT
    fd: int | None = None
    areas: tuple[tuple[int, int], ...] = ()


class TinyDevice:
    """BAR 0 are registers with the MSI-X table, BAR 2 memory that can be mapped, BAR 4 memory that can be
    mapped in part. INTx and four MSI-X vectors. Everything is memory: what is written is read back.
    """

    def __init__(self) -> None:
        self._plain = {RegionIndex.BAR0: bytearray(REGISTERS), RegionIndex.CONFIG: _config_space()}
        self._memory = {RegionIndex.BAR2: _memfd(MEMORY), RegionIndex.BAR4: _memfd(SPARSE)}
        mappable = _BOTH | RegionFlags.MMAP
        self.regions = [Region() for _ in RegionIndex]
        self.regions[RegionIndex.BAR0] = Region(REGISTERS, _BOTH)
        whole = ((0, MEMORY),)
        self.regions[RegionIndex.BAR2] = Region(MEMORY, mappable, self._memory[RegionIndex.BAR2], whole)
        self.regions[RegionIndex.BAR4] = Region(SPARSE, mappable, self._memory[RegionIndex.BAR4], AREAS)
        self.regions[RegionIndex.CONFIG] = Region(CONFIG_SIZE, _BOTH)
        intx = IrqInfoFlags.EVENTFD | IrqInfoFlags.MASKABLE | IrqInfoFlags.AUTOMASKED
        single = IrqInfoFlags.EVENTFD | IrqInfoFlags.NORESIZE
        self.irqs = [
            IrqInfo(IrqInfo.size, intx, IrqIndex.INTX, 1),
            IrqInfo(IrqInfo.size, single, IrqIndex.MSI, 0),
            IrqInfo(IrqInfo.size, IrqInfoFlags.EVENTFD, IrqIndex.MSIX, VECTORS),
            IrqInfo(IrqInfo.size, single, IrqIndex.ERR, 1),
            IrqInfo(IrqInfo.size, single, IrqIndex.REQ, 1),
        ]

    def close(self) -> None:
        """Give its memory back."""
        for fd in self._memory.values():
            os.close(fd)

    def read(self, index: int, offset: int, count: int) -> bytes:
        """Bytes of a region; `RefusedError`(EINVAL) outside of it."""
        self._check(index, offset, count)
        if index in self._memory:
            return os.pread(self._memory[RegionIndex(index)], count, offset)
        return bytes(self._plain[RegionIndex(index)][offset : offset + count])

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Change them; `RefusedError`(EINVAL) outside of the region."""
        self._check(index, offset, len(data))
        if index in self._memory:
            os.pwrite(self._memory[RegionIndex(index)], data, offset)
            return
        for at, byte in enumerate(data, offset):
            if index != RegionIndex.CONFIG or at not in _READ_ONLY:
                self._plain[RegionIndex(index)][at] = byte

    @property
    def bus_master(self) -> bool:
        """Software lets it do DMA."""
        return bool(self._plain[RegionIndex.CONFIG][COMMAND] & BUS_MASTER)

    def _check(self, index: int, offset: int, count: int) -> None:
        if not self.holds(index, offset, count):
            raise RefusedError(EINVAL)

    def holds(self, index: int, offset: int, count: int) -> bool:
        """These bytes are there."""
        return index < len(self.regions) and count <= self.regions[index].length - offset


_READ_ONLY: Final = frozenset({0, 1, 2, 3, 6, 7, *range(8, 12), 14, 0x34, 0x3D, *range(0x40, 0x4C)})
"""Of configuration space: ids, status, class, header type, and the one capability."""


def _config_space() -> bytearray:
    """A type 0 header with 64-bit BARs 2 and 4, pin A, and an MSI-X capability (PCI, "Configuration")."""
    space = bytearray(CONFIG_SIZE)
    space[0x00:0x04] = bytes.fromhex("34120c0f")
    space[0x06] = 0x10
    space[0x0B] = 0xFF
    space[0x18] = space[0x20] = 0x0C
    space[0x34] = 0x40
    space[0x3D] = 1
    space[0x40:0x4C] = bytes([0x11, 0, VECTORS - 1, 0]) + bytes.fromhex("00080000000c0000")
    return space


def _memfd(length: int) -> int:
    fd = os.memfd_create("tiny-device", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, length)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd
