"""What a driver writes that does not mean well: a life that looks right, and rings that do not."""

from __future__ import annotations

import mmap
import struct
from typing import Final

from device.card import COMMON, DOORBELLS
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

Write = tuple[int, int, int]
"""(offset in BAR 0, bytes, value)."""


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


def scribble(choices: Choices, guest: mmap.mmap) -> int:
    """Change descriptors and the available ring behind the card's back; the queue whose they are."""
    queue = choices.below(QUEUES)
    base = RING_STRIDE * queue
    for _ in range(1 + choices.below(4)):
        table = base if choices.often() else choices.below(MEMORY_PAGES * PAGE - RING_STRIDE)
        at = table + 16 * choices.below(RING_SIZE)
        address = choices.below(MEMORY_PAGES * PAGE) if choices.often() else choices.number(64)
        length = choices.pick((0, 1, 12, 16, 64, 1526, 4096)) if choices.often() else choices.number(32)
        flags = choices.below(4) if choices.often() else choices.number(16)
        struct.pack_into("<QIHH", guest, at, address, length, flags, choices.below(RING_SIZE + 2))
    driver = base + DRIVER_AREA
    for _ in range(choices.below(4)):
        head = choices.below(RING_SIZE) if choices.often() else choices.number(16)
        struct.pack_into("<H", guest, driver + 4 + 2 * choices.below(RING_SIZE), head)
    (index,) = struct.unpack_from("<H", guest, driver + 2)
    ahead = choices.below(RING_SIZE + 1) if choices.often() else choices.number(16)
    struct.pack_into("<HH", guest, driver, choices.below(2), (index + ahead) & 0xFFFF)
    return queue
