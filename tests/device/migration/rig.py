"""A function that can be moved, with a part of its own and a record of what happened to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from device.function import Bar, Identity, MemoryBar, PciFunction, RegionIndex
from device.migration.migration import Migration
from device.pci.capabilities import Msi, Msix, PciExpress, PowerManagement

COMMAND = 0x04
BUS_MASTER = 1 << 2
CONFIG = RegionIndex.CONFIG
MEMORY_SIZE = 1 << 20


class Number:
    """A part that is one number."""

    def __init__(self) -> None:
        self.value = 0

    def save(self) -> bytes:
        return self.value.to_bytes(8, "little")

    def stage(self, data: bytes) -> Callable[[], None]:
        if len(data) != 8:
            raise ValueError(f"{len(data)} bytes are no number")

        def apply() -> None:
            self.value = int.from_bytes(data, "little")

        return apply


class Rig:
    """A function with every kind of part of its own, a number beside them, and a record of its hooks."""

    def __init__(self, *, device: int = 0x1041, traits: dict[str, str] | None = None) -> None:
        self.function = PciFunction(
            "nic0",
            Identity(0x1AF4, device, 0x8086, 0x001A),
            bars=[Bar(0, 0x4000), MemoryBar(2, MEMORY_SIZE)],
            capabilities=[
                PowerManagement(),
                Msi(2),
                Msix(3, table_bar=0, table_offset=0x2000, pba_offset=0x3000),
                PciExpress(),
            ],
        )
        self.number = Number()
        self.function.migration = self.migration = Migration(
            self.function, {b"NUMB": self.number}, {"colour": "blue"} if traits is None else traits
        )
        self.happened: list[str] = []
        self.function.on_stop = lambda: self.happened.append("stop")
        self.function.on_run = lambda: self.happened.append("run")

    @property
    def stands(self) -> int:
        """The migration's state, as a number: no two reads of it are the same to mypy."""
        return int(self.migration.state)

    def configure(self, offset: int, count: int, value: int) -> None:
        self.function.region_write(CONFIG, offset, value.to_bytes(count, "little"))

    def seen(self) -> tuple[bytes, bytes, bytes, int]:
        """All that a client can read, and the number."""
        return (
            self.function.region_read(CONFIG, 0, 4096),
            self.function.region_read(0, 0, 0x4000),
            self.function.region_read(2, 0, MEMORY_SIZE),
            self.number.value,
        )

    def mark(self) -> None:
        """Leave a trace in every part."""
        self.configure(COMMAND, 2, BUS_MASTER)
        self.configure(0x3C, 1, 0x0B)
        self.function.region_write(0, 0x2010, b"\x00\x10\xe0\xfe" + bytes(4) + b"\x41\0\0\0")
        self.function.region_write(2, 12345, b"on the card")
        self.number.value = 42


@contextmanager
def rigs(*made: Rig) -> Iterator[tuple[Rig, ...]]:
    try:
        yield made
    finally:
        for rig in made:
            rig.function.close()
