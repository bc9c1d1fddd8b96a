"""The registers of a PC's irqchips as data, whoever has them: a model of ours, or KVM."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final, Self

PIC_INPUTS: Final = 16
"""Of two 8259A."""
PIC_HALF: Final = 8
"""Inputs of one of them; the slave's are 8 to 15."""
PIC_CASCADE: Final = 2
"""The input of the master that the slave is wired to."""
IOAPIC_INPUTS: Final = 24
"""Entries of an I/O APIC's redirection table (82093AA data sheet, 3.2.4)."""


@dataclass(frozen=True, slots=True)
class Pic8259State:
    """The registers of one 8259A, named as in KVM's kvm_pic_state; each a number of 8 bits."""

    last_irr: int = 0
    """The levels of the inputs."""
    irr: int = 0
    """Interrupt requests: for an edge latched, for a level as the input is."""
    imr: int = 0
    """Masked inputs."""
    isr: int = 0
    """In service: acknowledged and not ended."""
    priority_add: int = 0
    """The input with the highest priority."""
    irq_base: int = 0
    """The vector of input 0."""
    read_reg_select: int = 0
    """Which register the command port reads: 0 IRR, 1 ISR."""
    poll: int = 0
    """The next read is a poll."""
    special_mask: int = 0
    init_state: int = 0
    """The initialization word that is expected, less one; 0 none."""
    auto_eoi: int = 0
    rotate_on_auto_eoi: int = 0
    special_fully_nested_mode: int = 0
    init4: int = 0
    """ICW1 said that there will be an ICW4."""
    elcr: int = 0
    """Inputs that are levels rather than edges."""
    elcr_mask: int = 0
    """Inputs that can be levels."""

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From KVM's structure, which may be longer."""
        return cls(*data[: len(fields(cls))])


@dataclass(frozen=True, slots=True)
class PicState:
    """Both 8259As; the properties put their bits together, bit n for input n."""

    master: Pic8259State
    slave: Pic8259State

    @property
    def irr(self) -> int:
        """Requests: the inputs that are waiting for the CPU."""
        return self.master.irr | self.slave.irr << PIC_HALF

    @property
    def isr(self) -> int:
        """In service: acknowledged and not ended."""
        return self.master.isr | self.slave.isr << PIC_HALF

    @property
    def imr(self) -> int:
        """Masked inputs."""
        return self.master.imr | self.slave.imr << PIC_HALF

    @property
    def elcr(self) -> int:
        """Inputs that are levels rather than edges."""
        return self.master.elcr | self.slave.elcr << PIC_HALF


@dataclass(frozen=True, slots=True)
class RedirectionEntry:
    """What an I/O APIC does with an input (82093AA, 3.2.4), bit by bit."""

    vector: int = 0
    delivery_mode: int = 0
    """0 fixed, 1 lowest priority; the others are no interrupts of a device."""
    logical: bool = False
    """`destination` is a logical one, not the ID of an APIC."""
    sending: bool = False
    active_low: bool = False
    remote_irr: bool = False
    """A local APIC has it, for a level, and it has not been ended."""
    level: bool = False
    masked: bool = True
    destination: int = 0

    def pack(self) -> int:
        """The register's 64 bits."""
        return (
            self.vector
            | self.delivery_mode << 8
            | self.logical << 11
            | self.sending << 12
            | self.active_low << 13
            | self.remote_irr << 14
            | self.level << 15
            | self.masked << 16
            | self.destination << 56
        )

    @classmethod
    def unpack(cls, value: int) -> Self:
        """From the register's 64 bits; reserved ones are left out."""
        return cls(
            vector=value & 0xFF,
            delivery_mode=value >> 8 & 7,
            logical=bool(value >> 11 & 1),
            sending=bool(value >> 12 & 1),
            active_low=bool(value >> 13 & 1),
            remote_irr=bool(value >> 14 & 1),
            level=bool(value >> 15 & 1),
            masked=bool(value >> 16 & 1),
            destination=value >> 56,
        )
