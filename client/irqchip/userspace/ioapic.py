"""The PC's I/O APIC of 24 inputs (Intel 82093AA), with the local APIC of one CPU.

    async with open_ioapic() as chip:
        controller = InterruptController(chip, routes)

The guest's side is `read` and `write` with offsets into the I/O APIC's registers, and the same of
`local` for the local APIC's.

It does as KVM's (arch/x86/kvm/ioapic.c) where that does otherwise than the data sheet. Polarity is kept, but
an input is told whether it is asserted, not its voltage. An input that waits while it is masked, and has
eventfds, is let go when it is unmasked: they raise it again if it is still true. A level whose handler does
not take it down is delivered again at once, however often.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from client.irqchip.chip import IrqchipError
from client.irqchip.registers import IOAPIC_INPUTS, RedirectionEntry
from client.irqchip.userspace.chip import Delivery, UserspaceChip
from client.irqchip.userspace.local_apic import LocalApic, Offsets
from client.irqchip.userspace.local_apic import LocalApicState as LocalApicState

VERSION: Final = 0x11
"""Of the 82093AA, which has no EOI register."""

IOREGSEL: Final = 0x00
"""Which register IOWIN shows."""
IOWIN: Final = 0x10
WINDOW: Final = 0x100
"""Size of the registers' window."""
REDIRECTION: Final = 0x10
"""The register that is the low half of entry 0."""

VECTORS: Final = 0x30
"""Where `program` puts the 24 vectors: after those of the 8259A, in case both are in use."""

_ID: Final = 0x00
_VERSION: Final = 0x01
_ARBITRATION: Final = 0x02

_LOW: Final = 0xFFFF_FFFF
_REMOTE_IRR: Final = 1 << 14
_LEVEL: Final = 1 << 15
_MASKED: Final = 1 << 16
_READ_ONLY: Final = 1 << 12 | _REMOTE_IRR  # delivery status is never set here
_FIXED: Final = 0
_LOWEST_PRIORITY: Final = 1


@dataclass(frozen=True, slots=True)
class IoapicState:
    """All registers, and those of the local APIC."""

    id: int
    ioregsel: int
    irr: int
    """Inputs that are asserted; of edge-triggered ones only those that have not been delivered."""
    entries: tuple[RedirectionEntry, ...]
    local: LocalApicState


class Ioapic(UserspaceChip):
    """The I/O APIC as it is after power-on, with all inputs masked; see `program`.

    A vector that several inputs have is acknowledged for all whose request it carries, and the lowest of
    those is what `acknowledge` tells. What the local APIC has can no longer be withdrawn.
    """

    def __init__(self, name: str = "ioapic") -> None:
        super().__init__(name, IOAPIC_INPUTS)
        self.local: Final = LocalApic(self._eoi)
        self._id = 0
        self._ioregsel = 0
        self._irr = 0
        self._delivered = 0  # edges that went to the local APIC while their input stayed high
        self._entries = [_MASKED] * IOAPIC_INPUTS
        self._sharing: dict[int, list[int]] = {0: list(range(IOAPIC_INPUTS))}  # inputs of a vector
        self._carried: dict[int, int] = {}  # inputs, as bits, whose request a vector carries to the CPU
        self._serving: dict[int, int] = {}  # the same for vectors in service

    def state(self) -> IoapicState:
        """The registers as they are now."""
        entries = tuple(RedirectionEntry.unpack(bits) for bits in self._entries)
        return IoapicState(
            self._id, self._ioregsel, self._irr & ~self._delivered, entries, self.local.state()
        )

    def program(self, vectors: int = VECTORS) -> None:
        """Do what firmware and operating system do: enable the local APIC, and send each input to it with a
        vector of its own from `vectors` on, triggered by level, active low, not masked.
        """
        self.local.write(Offsets.LDR, 1 << 24)
        self.local.write(Offsets.SVR, 0x1FF)
        for gsi in range(IOAPIC_INPUTS):
            entry = RedirectionEntry(vectors + gsi, active_low=True, level=True, masked=False)
            self.redirect(gsi, entry)

    def redirect(self, gsi: int, entry: RedirectionEntry) -> None:
        """Write an entry of the redirection table through the registers, as a guest does."""
        for half, value in ((1, entry.pack() >> 32), (0, entry.pack() & _LOW)):
            self.write(IOREGSEL, REDIRECTION + 2 * gsi + half)
            self.write(IOWIN, value)

    def read(self, offset: int) -> int:
        """A register of 32 bits; where there is none it reads 0. Raises IrqchipError(ENXIO) beyond the
        window.
        """
        self._check_offset(offset)
        if offset == IOREGSEL:
            return self._ioregsel
        if offset != IOWIN:
            return 0
        if self._ioregsel in (_ID, _ARBITRATION):
            return self._id << 24
        if self._ioregsel == _VERSION:
            return (IOAPIC_INPUTS - 1) << 16 | VERSION
        gsi = self._selected()
        if gsi is None:
            return _LOW
        return self._entries[gsi] >> 32 if self._ioregsel & 1 else self._entries[gsi] & _LOW

    def write(self, offset: int, value: int) -> None:
        """Write a register of 32 bits; where there is none, or it is only read, nothing happens. Raises
        IrqchipError(ENXIO) beyond the window.
        """
        self._check_offset(offset)
        if offset == IOREGSEL:
            self._ioregsel = value & 0xFF
        elif offset == IOWIN:
            gsi = self._selected()
            if gsi is not None:
                self._write_entry(gsi, value & _LOW)
            elif self._ioregsel == _ID:
                self._id = value >> 24 & 0xF

    def end(self, delivery: Delivery) -> None:
        """See `UserspaceChip.end`. A guest can end only the vector of the highest priority in service."""
        if self.local.serves(delivery.vector):
            self.local.end(delivery.vector)

    def _acknowledge(self) -> Delivery | None:
        vector = self.local.acknowledge()
        self._want(self.local.wanted is not None)
        if vector is None:
            return None
        carried = self._serving[vector] = self._carried.pop(vector)
        for gsi in _bits(carried):
            self._accepted(gsi)
        return Delivery((carried & -carried).bit_length() - 1, vector)

    def _eoi(self, vector: int, level: bool) -> None:
        """The local APIC broadcasts the end of a vector."""
        for gsi in _bits(self._serving.pop(vector)):
            self.counters[gsi].ended += 1
        for gsi in self._sharing.get(vector, ()):
            self._release(gsi)
            if level:
                self._entries[gsi] &= ~_REMOTE_IRR
                if self._irr & 1 << gsi:
                    self._service(gsi)
        self._want(self.local.wanted is not None)

    def _set_input(self, gsi: int, level: bool) -> None:
        bit = 1 << gsi
        if not level:
            self._irr &= ~bit
            return
        before = self._irr
        self._irr |= bit
        if not self._entries[gsi] & _LEVEL:
            self._delivered &= ~bit
            if before & bit:
                return
        self._service(gsi)

    def _requests(self, gsi: int) -> bool:
        return any(carried & 1 << gsi for carried in self._carried.values())

    def _service(self, gsi: int) -> None:
        """Send an input's interrupt to the local APIC, unless it must wait."""
        entry = self._entries[gsi]
        level = bool(entry & _LEVEL)
        if entry & _MASKED or (level and entry & _REMOTE_IRR):
            return
        if not level:
            self._delivered |= 1 << gsi
        redirection = RedirectionEntry.unpack(entry)
        if redirection.delivery_mode not in (_FIXED, _LOWEST_PRIORITY):
            return
        if not self.local.matches(redirection.destination, redirection.logical):
            return
        if not self.local.accept(redirection.vector, level):
            return
        self._carried[redirection.vector] = self._carried.get(redirection.vector, 0) | 1 << gsi
        if level:
            self._entries[gsi] |= _REMOTE_IRR
        self._want(self.local.wanted is not None)

    def _selected(self) -> int | None:
        """The input whose entry IOREGSEL is at."""
        gsi = self._ioregsel - REDIRECTION >> 1
        return gsi if 0 <= gsi < IOAPIC_INPUTS else None

    def _write_entry(self, gsi: int, value: int) -> None:
        old = self._entries[gsi]
        if self._ioregsel & 1:
            entry = old & _LOW | value << 32
        else:
            entry = old & ~_LOW | value & ~_READ_ONLY | old & _READ_ONLY
        if not entry & _LEVEL:  # how Linux ends an interrupt where there is no EOI register
            entry &= ~_REMOTE_IRR
        self._entries[gsi] = entry
        self._share(gsi, old & 0xFF, entry & 0xFF)
        if entry & _LEVEL and self._irr & 1 << gsi and not entry & (_MASKED | _REMOTE_IRR):
            if self._raised_by_eventfds_alone(gsi):
                self._release(gsi)
            else:
                self._service(gsi)

    def _share(self, gsi: int, old: int, new: int) -> None:
        if old != new:
            self._sharing[old].remove(gsi)
            self._sharing[new] = sorted([*self._sharing.get(new, ()), gsi])

    def _check_offset(self, offset: int) -> None:
        if not 0 <= offset < WINDOW:
            raise IrqchipError(f"offset {offset:#x} of {self.name}", errno.ENXIO)


def _bits(inputs: int) -> Iterator[int]:
    while inputs:
        yield (inputs & -inputs).bit_length() - 1
        inputs &= inputs - 1


@asynccontextmanager
async def open_ioapic(name: str = "ioapic", *, programmed: bool = True) -> AsyncIterator[Ioapic]:
    """An I/O APIC, not active at first, as the system leaves it (`Ioapic.program`) or as after power-on."""
    chip = Ioapic(name)
    if programmed:
        chip.program()
    async with chip.watched():
        yield chip
