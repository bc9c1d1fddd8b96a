"""The least of a virtio driver: enough to make a virtio device reach into memory that only messages reach.

Structures and registers are those of Virtual I/O Device (VIRTIO) 1.3, sections 2.7 (split queues), 3.1.1
(initialisation) and 4.1.4 (PCI).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from conformance._device import BUS_MASTER, COMMAND, MEMORY_SPACE, config, read, resettable, write
from conformance._memory import IOVA, PAGE, Memory
from conformance._peer import Peer
from conformance.checks import NotApplicable, expect
from protocol.vfio import RegionIndex

VENDOR: Final = 0x1AF4
NETWORK: Final = 0x1041
"""Device id of a network device without legacy interface."""

ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
VERSION_1: Final = 1
"""The bit of feature word 1."""

TRANSMIT: Final = 1
SIZE: Final = 8
FRAME: Final = bytes(12) + b"\xff" * 6 + b"\x02" * 6 + b"\x88\xb5" + bytes(46)
"""A virtio-net header and a broadcast of the ethertype for local experiments."""

DESCRIPTORS: Final = IOVA
AVAILABLE: Final = IOVA + PAGE
USED: Final = IOVA + 2 * PAGE
BUFFER: Final = IOVA + 3 * PAGE
LENGTH: Final = 4 * PAGE

_COMMON, _NOTIFY = 1, 2


@dataclass(frozen=True, slots=True)
class _Place:
    bar: int
    offset: int


class Transmitter:
    """A virtio network card's transmit queue, whose rings lie in one window without a descriptor."""

    def __init__(self, peer: Peer, common: _Place, notify: _Place, multiplier: int) -> None:
        self.peer = peer
        self.memory: Memory = peer.memory(LENGTH)
        self._common = common
        self._notify = notify
        self._multiplier = multiplier

    async def start(self) -> None:
        """Bring the device up as far as sending goes."""
        await self._put(0x14, 1, 0)
        await self._put(0x14, 1, ACKNOWLEDGE | DRIVER)
        await self._put(0x08, 4, 1)
        await self._put(0x0C, 4, VERSION_1)
        await self._put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        status = await self._get(0x14, 1)
        expect(status & FEATURES_OK, "that VERSION_1 alone is accepted", hex(status))
        await self.peer.mapped(IOVA, self.memory, what="for a queue", shared=False)
        await self._put(0x16, 2, TRANSMIT)
        await self._put(0x18, 2, SIZE)
        for register, address in ((0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)):
            await self._put(register, 4, address)
            await self._put(register + 4, 4, 0)
        await self._put(0x1C, 2, 1)
        await self._put(0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    async def send(self) -> None:
        """Offer one frame and ring the doorbell."""
        self.memory.write(BUFFER - IOVA, FRAME)
        self.memory.write(0, struct.pack("<QIHH", BUFFER, len(FRAME), 0, 0))
        self.memory.write(AVAILABLE - IOVA, struct.pack("<HHH", 0, 1, 0))
        await self._put(0x16, 2, TRANSMIT)
        offset = self._notify.offset + await self._get(0x1E, 2) * self._multiplier
        await write(self.peer, self._notify.bar, offset, struct.pack("<H", TRANSMIT))

    @property
    def sent(self) -> int:
        """Frames that the device has done with."""
        return int.from_bytes(self.memory.read(USED - IOVA + 2, 2), "little")

    async def _put(self, register: int, size: int, value: int) -> None:
        place = self._common
        await write(self.peer, place.bar, place.offset + register, value.to_bytes(size, "little"))

    async def _get(self, register: int, size: int) -> int:
        place = self._common
        return int.from_bytes(await read(self.peer, place.bar, place.offset + register, size), "little")


async def transmitter(peer: Peer) -> Transmitter:
    """The device's transmit queue, ready; `NotApplicable` for anything but a virtio network card."""
    await config(peer)
    await resettable(peer)
    space = await read(peer, RegionIndex.CONFIG, 0, 256)
    if struct.unpack_from("<HH", space) != (VENDOR, NETWORK):
        raise NotApplicable("only a virtio network card is known well enough to make it do DMA")
    command = int.from_bytes(space[COMMAND : COMMAND + 2], "little") | BUS_MASTER | MEMORY_SPACE
    await write(peer, RegionIndex.CONFIG, COMMAND, command.to_bytes(2, "little"))
    places: dict[int, _Place] = {}
    multiplier = 0
    at = space[0x34] & 0xFC
    while at >= 0x40 and at + 20 <= len(space):
        if space[at] == 0x09:
            kind, bar, offset = (
                space[at + 3],
                space[at + 4],
                int.from_bytes(space[at + 8 : at + 12], "little"),
            )
            places.setdefault(kind, _Place(bar, offset))
            if kind == _NOTIFY:
                multiplier = int.from_bytes(space[at + 16 : at + 20], "little")
        at = space[at + 1] & 0xFC if space[at + 1] & 0xFC > at else 0
    if not {_COMMON, _NOTIFY} <= places.keys():
        raise NotApplicable("the card has no virtio structures")
    found = Transmitter(peer, places[_COMMON], places[_NOTIFY], multiplier)
    await found.start()
    return found
