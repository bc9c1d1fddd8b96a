"""The part of a CPU's local APIC that an I/O APIC needs: requests, interrupts in service, end of interrupt.

Intel SDM volume 3, "Advanced Programmable Interrupt Controller"; without task priority, timer or IPIs. Sets
of vectors are integers, vector n being bit n.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from client.irqchip.chip import IrqchipError

PAGE: Final = 0x1000
"""Size of the registers' window."""


class Offsets(IntEnum):
    """Where the registers are in the page."""

    ID = 0x20
    PPR = 0xA0
    EOI = 0xB0
    LDR = 0xD0
    SVR = 0xF0
    ISR = 0x100
    TMR = 0x180
    IRR = 0x200


_BANK: Final = 0x80  # bytes from the first of eight registers, 16 bytes apart, to what is after the last
_ENABLED: Final = 0x100
_BROADCAST: Final = 0xFF
_CLASS: Final = 0xF0  # vectors of one priority class have these bits in common


@dataclass(frozen=True, slots=True)
class LocalApicState:
    """Its registers."""

    id: int
    logical: int
    """The logical destination, of the flat model: eight bits."""
    enabled: bool
    """By software, in the spurious-interrupt vector register."""
    irr: int
    """Vectors that wait for the CPU."""
    isr: int
    """Vectors in service."""
    tmr: int
    """Vectors accepted last for a level: an I/O APIC waits for their end."""


class LocalApic:
    """As after power-on: accepts nothing before it is enabled. `ended(vector, level)` is told of each end of
    interrupt, which goes to the I/O APIC.
    """

    def __init__(self, ended: Callable[[int, bool], None], apic_id: int = 0) -> None:
        self._ended = ended
        self._id = apic_id
        self._logical = 0
        self._svr = 0xFF
        self._irr = 0
        self._isr = 0
        self._tmr = 0

    def state(self) -> LocalApicState:
        """The registers as they are now."""
        enabled = bool(self._svr & _ENABLED)
        return LocalApicState(self._id, self._logical, enabled, self._irr, self._isr, self._tmr)

    def matches(self, destination: int, logical: bool) -> bool:
        """Whether a message to a destination is for this one."""
        if destination == _BROADCAST:
            return True
        return bool(destination & self._logical) if logical else destination == self._id

    def accept(self, vector: int, level: bool) -> bool:
        """A message from an I/O APIC; whether it was accepted. That cannot be undone."""
        if not self._svr & _ENABLED:
            return False
        bit = 1 << vector
        self._irr |= bit
        if level:
            self._tmr |= bit
        else:
            self._tmr &= ~bit
        return True

    @property
    def ppr(self) -> int:
        """Processor priority: the class of what is in service."""
        return (self._isr.bit_length() - 1) & _CLASS if self._isr else 0

    @property
    def wanted(self) -> int | None:
        """The vector to interrupt the CPU with. Those below 16 never are: their class is no higher than
        the CPU's at rest.
        """
        vector = self._irr.bit_length() - 1
        return vector if vector >= 0 and vector & _CLASS > self.ppr else None

    def acknowledge(self) -> int | None:
        """The CPU takes a vector, which is in service from now on; None if there is none."""
        vector = self.wanted
        if vector is not None:
            self._irr &= ~(1 << vector)
            self._isr |= 1 << vector
        return vector

    def serves(self, vector: int) -> bool:
        """Whether a vector is in service."""
        return bool(self._isr & 1 << vector)

    def end(self, vector: int) -> None:
        """End a vector that is in service."""
        self._isr &= ~(1 << vector)
        self._ended(vector, bool(self._tmr & 1 << vector))

    def read(self, offset: int) -> int:
        """A register of 32 bits; those that are not modelled read 0. Raises IrqchipError(ENXIO) beyond the
        page.
        """
        self._check(offset)
        for bank, vectors in ((Offsets.ISR, self._isr), (Offsets.TMR, self._tmr), (Offsets.IRR, self._irr)):
            if bank <= offset < bank + _BANK:
                return vectors >> 2 * (offset - bank & ~0xF) & 0xFFFF_FFFF
        match offset:
            case Offsets.ID:
                return self._id << 24
            case Offsets.PPR:
                return self.ppr
            case Offsets.LDR:
                return self._logical << 24
            case Offsets.SVR:
                return self._svr
        return 0

    def write(self, offset: int, value: int) -> None:
        """Write a register of 32 bits; those that are not modelled, or only read, ignore it. Raises
        IrqchipError(ENXIO) beyond the page.
        """
        self._check(offset)
        match offset:
            case Offsets.ID:
                self._id = value >> 24 & 0xFF
            case Offsets.EOI if self._isr:
                self.end(self._isr.bit_length() - 1)
            case Offsets.LDR:
                self._logical = value >> 24 & 0xFF
            case Offsets.SVR:
                self._svr = value & 0x1FF

    @staticmethod
    def _check(offset: int) -> None:
        if not 0 <= offset < PAGE:
            raise IrqchipError(f"offset {offset:#x} of the local APIC", errno.ENXIO)
