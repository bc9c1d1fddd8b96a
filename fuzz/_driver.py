"""What a driver writes that does not mean well: a life that looks right, and rings that do not."""

from __future__ import annotations

import mmap
import struct
from typing import Final

from device.profiles import COMMON, DOORBELLS, LIVE_MIGRATION_BAR, REGISTERS_BAR
from fuzz._choices import PAGE, Choices
from fuzz._zoo import MEMORY_PAGES

QUEUES: Final = 3
RING_SIZE: Final = 16
RING_STRIDE: Final = 2 * PAGE
DRIVER_AREA: Final = PAGE
DEVICE_AREA: Final = PAGE + 1024
"""Bytes from the start of a queue's rings, which begin at a multiple of RING_STRIDE in memory that is mapped
at address 0.
"""

BUFFERS: Final = QUEUES * RING_STRIDE
"""Where chains may point to without harm, up to the end of the memory."""

Write = tuple[int, int, int]
"""(offset in BAR 0, bytes, value)."""

Access = tuple[int, int, int, int]
"""(BAR, offset, bytes, value)."""

LOG_CONTROL: Final = 0x00
LOG_STATUS: Final = 0x08
LOG_BASE: Final = 0x10
LOG_END: Final = 0x18
RING_STATE: Final = (0x20, 0x22, 0x24, 0x26, 0x28, 0x2A, 0x60, 0x62)
"""Of the live-migration block; ring state as any driver looks for it."""


def life(choices: Choices, offered: int) -> list[Write]:
    """All that a driver writes until its queues run (virtio 1.3, 3.1.1), now and then something else."""
    features = offered if choices.often() else offered & choices.number(64)
    writes = [(0x14, 1, 0), (0x14, 1, 3)]
    for word in range(2):
        writes += [(0x08, 4, word), (0x0C, 4, features >> 32 * word & 0xFFFF_FFFF)]
    writes += [(0x14, 1, 11), (0x10, 2, QUEUES)]
    for queue in range(QUEUES):
        base = RING_STRIDE * queue if choices.often() else choices.number(64)
        size = RING_SIZE if choices.often() else choices.number(16)
        writes += [(0x16, 2, queue), (0x18, 2, size), (0x1A, 2, queue), (0x20, 8, base)]
        writes += [(0x28, 8, base + DRIVER_AREA), (0x30, 8, base + DEVICE_AREA), (0x1C, 2, 1)]
    writes.append((0x14, 1, 15))
    return [(COMMON + offset, width, value & (1 << 8 * width) - 1) for offset, width, value in writes]


def doorbell(queue: int) -> Write:
    """What tells the card of new chains."""
    return DOORBELLS + PAGE * queue, 2, queue


def live_migration(choices: Choices) -> list[Access]:
    """What a driver of the IFC VF does to its block and to single queues, at the wrong times too: ring state
    of queues that run, logs that lie over rings or beyond all addresses, or end before they begin.
    """
    queue = choices.below(QUEUES)
    match choices.below(4):
        case 0:
            base = choices.below(MEMORY_PAGES * PAGE) if choices.often() else choices.number(64)
            end = base + choices.below(2 * MEMORY_PAGES // 8) if choices.often() else choices.number(64)
            return [
                (LIVE_MIGRATION_BAR, LOG_BASE, 8, base),
                (LIVE_MIGRATION_BAR, LOG_END, 8, end & (1 << 64) - 1),
                (LIVE_MIGRATION_BAR, LOG_CONTROL, 4, choices.pick((1, 3, 1, 3, 1, 2, 0xFFFF_FFFF))),
            ]
        case 1:
            return [(LIVE_MIGRATION_BAR, LOG_CONTROL, 4, 0)]
        case 2:
            width = choices.pick((2, 4, 2, 4, 1, 8))
            place = choices.pick(RING_STATE)
            return [(LIVE_MIGRATION_BAR, place, width, choices.number(64) & (1 << 8 * width) - 1)]
        case _:
            return [
                (REGISTERS_BAR, COMMON + 0x16, 2, queue),
                (REGISTERS_BAR, COMMON + 0x1C, 2, choices.pick((0, 0, 0, 1, 0xFFFF))),
            ]


def furnish(guest: mmap.mmap) -> None:
    """Empty rings, and descriptors that all are good, so that any head is."""
    guest[:BUFFERS] = bytes(BUFFERS)
    for index in range(RING_SIZE):
        address = BUFFERS + 2 * PAGE * index
        struct.pack_into("<QIHH", guest, 16 * index, address, 2048, 2, 0)
        guest[address + PAGE : address + PAGE + 90] = bytes(12) + b"\xff" * 6 + bytes(range(72))
        struct.pack_into("<QIHH", guest, RING_STRIDE + 16 * index, address + PAGE, 90, 0, 0)
        guest[address + 3000 : address + 3003] = b"\0\0\1"
        command = (address + 3000, 3, 1, index | 1) if index % 2 == 0 else (address + 3004, 1, 2, 0)
        struct.pack_into("<QIHH", guest, 2 * RING_STRIDE + 16 * index, *command)


def scribble(choices: Choices, guest: mmap.mmap) -> int:
    """Offer chains behind the card's back, good ones and others; the queue whose they are."""
    queue = choices.below(QUEUES)
    base = RING_STRIDE * queue
    for _ in range(choices.below(4)):
        table = base if choices.often() else choices.below(MEMORY_PAGES * PAGE - RING_STRIDE)
        index = choices.below(RING_SIZE)
        address, length, flags, following = _descriptor(choices, queue, index, guest)
        struct.pack_into("<QIHH", guest, table + 16 * index, address, length, flags, following)
    driver = base + DRIVER_AREA
    (first,) = struct.unpack_from("<H", guest, driver + 2)
    ahead = choices.below(5) if choices.often() else choices.number(16)
    for place in range(min(ahead, RING_SIZE)):
        head = choices.below(RING_SIZE) if choices.often() else choices.number(16)
        struct.pack_into("<H", guest, driver + 4 + 2 * ((first + place) % RING_SIZE), head)
    struct.pack_into("<HH", guest, driver, choices.below(2), (first + ahead) & 0xFFFF)
    return queue


def _descriptor(choices: Choices, queue: int, index: int, guest: mmap.mmap) -> tuple[int, int, int, int]:
    """(address, length, flags, next): mostly what the queue is for."""
    if choices.seldom():
        return choices.number(64), choices.number(32), choices.number(16), choices.below(RING_SIZE + 2)
    address = BUFFERS + choices.below(MEMORY_PAGES * PAGE - BUFFERS)
    following = (index + 1) % RING_SIZE if choices.often() else choices.below(RING_SIZE)
    match queue:
        case 0:
            return address, choices.pick((2048, 2048, 12, 1, 64)), choices.pick((2, 2, 2, 3)), following
        case 1:
            room = MEMORY_PAGES * PAGE - address
            header = bytes((choices.byte() & 1, choices.pick((0, 0, 0, 1, 4, 0x81)))) + choices.bytes(10)
            frame = header.ljust(12, b"\0") + (b"\xff" * 6).ljust(14 + choices.below(64), b"\x45")
            guest[address : address + min(room, len(frame))] = frame[:room]
            return (
                address,
                choices.pick((12 + 64, 12 + 64, 12, 14, 2048)),
                choices.pick((0, 0, 0, 1, 4)),
                following,
            )
        case _:
            if choices.byte() & 1:
                return address, 1, 2, following
            command = bytes((choices.below(3), choices.below(6))) + choices.bytes(8)
            guest[address : address + len(command)] = command[: MEMORY_PAGES * PAGE - address]
            return address, choices.pick((3, 8, 10, 64)), 1, following
