"""The device's side of a split virtqueue in plain Python, written from virtio 1.3, 2.7: the witness for the
driver's side.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

NEXT, WRITE = 1, 2


@dataclass
class Chain:
    """What the driver offers: (iova, bytes) to read and to write."""

    head: int
    readable: list[tuple[int, int]] = field(default_factory=list)
    writable: list[tuple[int, int]] = field(default_factory=list)


class RingDevice:
    """A device that reaches `memory`, which begins at `iova`, and a queue of `size` at three addresses."""

    def __init__(
        self,
        memory: memoryview,
        iova: int,
        size: int,
        descriptors: int,
        driver: int,
        device: int,
        *,
        event_index: bool,
    ) -> None:
        assert descriptors % 16 == 0
        assert driver % 2 == 0
        assert device % 4 == 0
        self.memory = memory
        self.iova = iova
        self.size = size
        self.descriptors, self.driver, self.device = descriptors, driver, device
        self.event_index = event_index
        self.seen = 0
        self.used = 0

    def at(self, address: int, length: int) -> memoryview:
        """The bytes at an I/O address; they must be inside the memory."""
        start = address - self.iova
        assert start >= 0
        assert start + length <= len(self.memory)
        return self.memory[start : start + length]

    def u16(self, address: int) -> int:
        """A little-endian number in memory."""
        return int(struct.unpack("<H", self.at(address, 2))[0])

    def put16(self, address: int, value: int) -> None:
        """Write a little-endian number to memory."""
        self.at(address, 2)[:] = struct.pack("<H", value)

    def take(self) -> list[Chain]:
        """All chains that were offered since the last time."""
        chains = []
        until = self.u16(self.driver + 2)
        assert (until - self.seen) % 65536 <= self.size, "the driver offers more than the ring holds"
        while self.seen != until:
            chains.append(self._walk(self.u16(self.driver + 4 + 2 * (self.seen % self.size))))
            self.seen = (self.seen + 1) % 65536
        if self.event_index:
            self.put16(self.device + 4 + 8 * self.size, self.seen)
        return chains

    def _walk(self, head: int) -> Chain:
        chain = Chain(head)
        at, steps = head, 0
        while True:
            assert at < self.size
            assert steps < self.size, "a loop"
            address, length, flags, following = struct.unpack(
                "<QIHH", self.at(self.descriptors + 16 * at, 16)
            )
            if flags & WRITE:
                chain.writable.append((address, length))
            else:
                assert not chain.writable, "readable after writable"
                chain.readable.append((address, length))
            if not flags & NEXT:
                return chain
            at, steps = following, steps + 1

    def read(self, chain: Chain) -> bytes:
        """All readable bytes of a chain."""
        return b"".join(bytes(self.at(*part)) for part in chain.readable)

    def write(self, chain: Chain, data: bytes) -> int:
        """Fill a chain's writable parts; how many bytes fitted."""
        written = 0
        for address, length in chain.writable:
            part = data[written : written + length]
            self.at(address, len(part))[:] = part
            written += len(part)
        return written

    def give(self, *chains: tuple[Chain | int, int]) -> bool:
        """Give chains back as (chain, bytes written), in one go; whether an interrupt is due."""
        old = self.used
        for chain, written in chains:
            head = chain if isinstance(chain, int) else chain.head
            entry = self.device + 4 + 8 * (self.used % self.size)
            self.at(entry, 8)[:] = struct.pack("<II", head, written)
            self.used = (self.used + 1) % 65536
        self.put16(self.device + 2, self.used)
        if not self.event_index:
            return not self.u16(self.driver) & 1
        event = self.u16(self.driver + 4 + 2 * self.size)
        return (self.used - event - 1) % 65536 < (self.used - old) % 65536

    def want_notifications(self, wanted: bool) -> None:
        """Ask the driver for notifications from the next chain on, or for none."""
        if self.event_index:
            self.put16(self.device + 4 + 8 * self.size, self.seen if wanted else (self.seen + 0x8000) % 65536)
        else:
            self.put16(self.device, 0 if wanted else 1)
