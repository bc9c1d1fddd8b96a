"""Snapshots of the irqchip in the kernel (KVM_GET_IRQCHIP)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from client.irqchip.registers import Pic8259State as Pic8259State
from client.irqchip.registers import PicState as PicState
from client.irqchip.registers import RedirectionEntry as RedirectionEntry
from client.kvm import _abi


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
