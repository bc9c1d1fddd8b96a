"""Snapshots of the irqchip in the kernel (KVM_GET_IRQCHIP), and an I/O APIC's redirection entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from client.kvm import _abi

PIC_CASCADE_PINS: Final = 8
"""Inputs of one 8259A; the second one's are 8 to 15."""


@dataclass(frozen=True, slots=True)
class Pic8259State:
    """The registers of one 8259A, named as in kvm_pic_state; each a number of 8 bits."""

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From KVM's structure."""
        raw = _abi.PicRegisters.from_buffer_copy(data)
        return cls(*(getattr(raw, field[0]) for field in raw._fields_))


@dataclass(frozen=True, slots=True)
class PicState:
    """Both 8259As; the properties put their bits together, bit n for input n."""

    master: Pic8259State
    slave: Pic8259State

    @property
    def irr(self) -> int:
        """Requests: the inputs that are waiting for the CPU."""
        return self.master.irr | self.slave.irr << PIC_CASCADE_PINS

    @property
    def isr(self) -> int:
        """In service: acknowledged and not ended."""
        return self.master.isr | self.slave.isr << PIC_CASCADE_PINS

    @property
    def imr(self) -> int:
        """Masked inputs."""
        return self.master.imr | self.slave.imr << PIC_CASCADE_PINS

    @property
    def elcr(self) -> int:
        """Inputs that are levels rather than edges."""
        return self.master.elcr | self.slave.elcr << PIC_CASCADE_PINS


@dataclass(frozen=True, slots=True)
class RedirectionEntry:
    """What an I/O APIC does with an input (82093AA, 3.2.4), bit by bit."""

    vector: int = 0
    delivery_mode: int = 0
    logical: bool = False
    sending: bool = False
    active_low: bool = False
    remote_irr: bool = False
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


@dataclass(frozen=True, slots=True)
class IoapicState:
    """The I/O APIC: `irr` has a bit for each input that is high, `entries` one for each input."""

    base_address: int
    ioregsel: int
    id: int
    irr: int
    entries: tuple[RedirectionEntry, ...]

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """From KVM's structure."""
        raw = _abi.IoapicRegisters.from_buffer_copy(data)
        entries = tuple(RedirectionEntry.unpack(value) for value in raw.redirtbl)
        return cls(raw.base_address, raw.ioregsel, raw.id, raw.irr, entries)

    def pack(self) -> bytes:
        """As KVM takes it."""
        return bytes(
            _abi.IoapicRegisters(
                base_address=self.base_address,
                ioregsel=self.ioregsel,
                id=self.id,
                irr=self.irr,
                redirtbl=tuple(entry.pack() for entry in self.entries),
            )
        )
