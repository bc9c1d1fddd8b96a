"""A device of one's own: two registers and an interrupt, served like any card.

    offset 0  read/write  the sum; writing a number adds it
    offset 4  read        how often something was added

Every addition fires MSI-X vector 0. The MSI-X table and its pending bits are in the same BAR, from 0x800 on.
`python examples/adder.py` serves it, uses it, and ends; a QEMU could as well.
"""

import tempfile
from pathlib import Path

import trio

import trionic
from device.pci import Bar, Identity
from device.pci.capabilities import Msix, PowerManagement

SUM, ADDITIONS = 0, 4


class Adder:
    """The registers; `function` is what a server serves."""

    def __init__(self) -> None:
        self.sum = self.additions = 0
        registers = Bar(0, 0x1000)
        registers.claim(0, 8, self, name="adder")
        self.function = trionic.PciFunction(
            "adder",
            Identity(vendor=0x1234, device=0xADD0, subsystem_vendor=0, subsystem=0, class_code=0xFF0000),
            bars=[registers],
            capabilities=[PowerManagement(), Msix(1, table_bar=0, table_offset=0x800, pba_offset=0xC00)],
        )
        self.function.on_reset = lambda kind: self.clear()

    def clear(self) -> None:
        """Power-on state."""
        self.sum = self.additions = 0

    def read(self, offset: int, count: int) -> int:
        """A register, as the BAR asks for it."""
        return self.sum if offset == SUM else self.additions

    def write(self, offset: int, count: int, value: int) -> None:
        """Add, and say so."""
        if offset == SUM:
            self.sum = (self.sum + value) & 0xFFFFFFFF
            self.additions += 1
            self.function.interrupts.signal(0)


async def main() -> None:
    """Add up to ten over the socket, woken by the device each time."""
    with tempfile.TemporaryDirectory() as folder:
        await add(Path(folder) / "adder.sock")


async def add(path: Path) -> None:
    """Serve the device and use it."""
    async with trio.open_nursery() as nursery:
        await nursery.start(trionic.serve, [(Adder().function, path)])
        async with trionic.connect(path) as session, trionic.msix(session, 1) as (added,):
            for number in range(1, 11):
                await session.region_write(0, SUM, number.to_bytes(4, "little"))
                await added.wait()
            total, additions = [
                int.from_bytes(await session.region_read(0, register, 4), "little")
                for register in (SUM, ADDITIONS)
            ]
        print(f"the sum of {additions} numbers is {total}")
        nursery.cancel_scope.cancel()


trio.run(main)
