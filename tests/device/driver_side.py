"""A driver's side of a split virtqueue in plain Python, written from virtio 1.3 section 2.7.

The witness for the device's side: nothing here is shared with it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from device.dma import DmaWindows

NEXT, WRITE, INDIRECT = 1, 2, 4


class GuestMemory:
    """`size` bytes of shared memory that a DMA window at `iova` shows to the device."""

    def __init__(self, size: int = 1 << 20, iova: int = 0x10000) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.size = size
        self.iova = iova
        self.bytes = mmap.mmap(self.fd, size)
        self._next = iova

    def map_into(self, dma: DmaWindows, prot: int = 3) -> None:
        dma.map(self.iova, self.size, prot, self.fd, 0)

    def allocate(self, size: int, align: int = 16) -> int:
        address = (self._next + align - 1) & ~(align - 1)
        self._next = address + size
        assert self._next <= self.iova + self.size
        return address

    def write(self, address: int, data: bytes) -> None:
        at = address - self.iova
        self.bytes[at : at + len(data)] = data

    def read(self, address: int, size: int) -> bytes:
        at = address - self.iova
        return self.bytes[at : at + size]

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


@contextmanager
def guest_memory(dma: DmaWindows | None = None, **kwargs: int) -> Iterator[GuestMemory]:
    memory = GuestMemory(**kwargs)
    if dma is not None:
        memory.map_into(dma)
    try:
        yield memory
    finally:
        memory.close()


@dataclass
class DriverRing:
    """Rings of `size` descriptors in `memory`; buffers are (address, length, device_writable)."""

    memory: GuestMemory
    size: int
    descriptors: int = 0
    driver: int = 0
    device: int = 0
    avail_index: int = 0
    used_seen: int = 0
    free: list[int] = field(default_factory=list)
    chains: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.descriptors = self.memory.allocate(16 * self.size)
        self.driver = self.memory.allocate(6 + 2 * self.size, 2)
        self.device = self.memory.allocate(6 + 8 * self.size, 4)
        self.free = list(range(self.size))[::-1]

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self.descriptors, self.driver, self.device

    def set_descriptor(self, index: int, address: int, length: int, flags: int, next_index: int = 0) -> None:
        self.memory.write(
            self.descriptors + 16 * index, struct.pack("<QIHH", address, length, flags, next_index)
        )

    def make_available(self, head: int) -> None:
        slot = self.driver + 4 + 2 * (self.avail_index % self.size)
        self.memory.write(slot, struct.pack("<H", head))
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self.memory.write(self.driver + 2, struct.pack("<H", self.avail_index))

    def add(self, buffers: Sequence[tuple[int, int, bool]]) -> int:
        indices = [self.free.pop() for _ in buffers]
        for n, (index, (address, length, writable)) in enumerate(zip(indices, buffers, strict=True)):
            last = n == len(buffers) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            self.set_descriptor(index, address, length, flags, 0 if last else indices[n + 1])
        self.chains[indices[0]] = indices
        self.make_available(indices[0])
        return indices[0]

    def add_indirect(self, buffers: Sequence[tuple[int, int, bool]]) -> int:
        table = self.memory.allocate(16 * len(buffers))
        for n, (address, length, writable) in enumerate(buffers):
            last = n == len(buffers) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            self.memory.write(
                table + 16 * n, struct.pack("<QIHH", address, length, flags, 0 if last else n + 1)
            )
        index = self.free.pop()
        self.set_descriptor(index, table, 16 * len(buffers), INDIRECT)
        self.chains[index] = [index]
        self.make_available(index)
        return index

    def used(self) -> list[tuple[int, int]]:
        """What the device has handed back since the last call, as (head, written)."""
        (index,) = struct.unpack("<H", self.memory.read(self.device + 2, 2))
        done = []
        while self.used_seen != index:
            slot = self.device + 4 + 8 * (self.used_seen % self.size)
            head, written = struct.unpack("<II", self.memory.read(slot, 8))
            done.append((head, written))
            self.free.extend(self.chains.pop(head, []))
            self.used_seen = (self.used_seen + 1) & 0xFFFF
        return done

    def set_no_interrupt(self, wanted: bool) -> None:
        self.memory.write(self.driver, struct.pack("<H", 1 if wanted else 0))

    def set_used_event(self, index: int) -> None:
        self.memory.write(self.driver + 4 + 2 * self.size, struct.pack("<H", index & 0xFFFF))

    @property
    def no_notify(self) -> bool:
        return bool(self.memory.read(self.device, 2)[0] & 1)

    @property
    def avail_event(self) -> int:
        value: int = struct.unpack("<H", self.memory.read(self.device + 4 + 8 * self.size, 2))[0]
        return value
