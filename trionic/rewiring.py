"""Drives a card by INTx in a machine that changes its irqchip again and again, and counts what becomes of the
interrupts and of the frames that depend on them.

The machine is `client.irqchip`: a pair of 8259A and an I/O APIC take turns, and a processor in this process
runs the driver's handler.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

import client
from client.irqchip import InterruptController, Intx, IntxMode, IntxRoute
from client.irqchip.processor import open_processor
from client.irqchip.userspace import UserspaceChip, open_ioapic, open_pic
from client.virtio import Slot, Wiring, open_net
from trionic._groups import ungrouped
from trionic._traffic import Frames, Traffic

__all__ = ["Rewiring", "rewire"]

GSI: Final = 11
"""An input that both irqchips have, and that PCI may use on a PC."""

BETWEEN: Final = 64
"""Frames that come back between two changes, so that each finds the line at work."""


@dataclass(slots=True)
class Rewiring(Frames):
    """What became of the frames, and of the interrupts that told of them.

    `signalled` counts the card's signals, `delivered` those that a processor took, and `repeated` those that
    it did not: a change took them back, and the card said them again, or they said again what was waiting.
    `dark` has the seconds that each change kept the line masked.
    """

    changes: int = 0
    signalled: int = 0
    delivered: int = 0
    repeated: int = 0
    dark: list[float] = field(default_factory=list)

    @property
    def interrupts_lost(self) -> int:
        """Signals that were neither delivered nor said again."""
        return max(0, self.signalled - self.delivered - self.repeated)

    @property
    def interrupts_doubled(self) -> int:
        """Interrupts that were delivered without a signal."""
        return max(0, self.delivered + self.repeated - self.signalled)

    @property
    def dark_ms(self) -> tuple[float, float]:
        """How long a change kept the line masked: in the middle of all, and the longest."""
        return 1e3 * statistics.median(self.dark), 1e3 * max(self.dark)

    def count(self, chips: Sequence[UserspaceChip], line: Intx) -> None:
        """Take what the irqchips and the line have counted."""
        inputs, counters = [counters for chip in chips for counters in chip.counters], line.counters
        self.signalled = counters.drained + counters.triggers + sum(each.triggered for each in inputs)
        self.delivered = sum(each.acknowledged for each in inputs)
        self.repeated = counters.drained + counters.merged
        self.repeated += sum(each.merged + each.withdrawn + each.resampled for each in inputs)
        self.changes = counters.changes
        self.dark = list(line.dark)


async def rewire(card: Path, changes: int) -> Rewiring:
    """Change the irqchip so often while the card at `card` sends and receives.

    ClientError if the card cannot be reached, sends nothing back, has no fast path or loses it, or falls
    silent.
    """
    with ungrouped(client.ClientError):
        return await _rewire(card, changes)


async def _rewire(card: Path, changes: int) -> Rewiring:
    tally = Rewiring()
    async with client.connect(card) as session, open_pic() as pic, open_ioapic() as ioapic:
        controller = InterruptController(pic, [IntxRoute(IntxMode.ENABLED, GSI)])
        async with open_processor(controller) as cpu:
            async with (
                open_net(session, wiring=Wiring.INTX, slot=Slot(cpu)) as nic,
                trio.open_nursery() as nursery,
            ):
                line = nic.line
                assert line is not None
                traffic = Traffic(nic, tally)
                nursery.start_soon(traffic.send)
                nursery.start_soon(traffic.receive)
                await traffic.wait_begun()
                for change in range(changes):
                    await controller.activate(pic if change % 2 else ioapic)
                    if line.failure is not None or not line.accelerated:
                        raise line.failure or client.ClientError("the card's INTx does not mask itself")
                    if not await traffic.wait_more(BETWEEN):
                        raise client.ClientError(f"the card fell silent after change {change + 1}")
                await traffic.end()
                nursery.cancel_scope.cancel()
            for chip in (ioapic, pic):  # either may keep what a CPU had not taken when it was left
                await controller.activate(chip)
                while chip.asks:
                    await trio.lowlevel.checkpoint()
            tally.count((pic, ioapic), line)
    return tally
