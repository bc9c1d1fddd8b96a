from __future__ import annotations

import errno

import pytest

from client.irqchip import IrqchipError
from client.irqchip.userspace.local_apic import LocalApic, Offsets


class Ends(list[tuple[int, bool]]):
    def __call__(self, vector: int, level: bool) -> None:
        self.append((vector, level))


def enabled() -> tuple[LocalApic, Ends]:
    ends = Ends()
    apic = LocalApic(ends, apic_id=3)
    apic.write(Offsets.SVR, 0x1FF)
    return apic, ends


def test_it_accepts_nothing_until_it_is_enabled() -> None:
    apic = LocalApic(Ends())
    assert not apic.accept(0x40, True)
    apic.write(Offsets.SVR, 0x1FF)
    assert apic.accept(0x40, True)
    assert apic.wanted == 0x40


def test_only_a_higher_class_interrupts_what_is_in_service() -> None:
    apic, _ = enabled()
    apic.accept(0x41, True)
    assert apic.acknowledge() == 0x41
    apic.accept(0x4F, True)
    assert apic.acknowledge() is None
    assert apic.ppr == 0x40
    apic.accept(0x50, True)
    assert apic.acknowledge() == 0x50
    apic.end(0x50)
    assert apic.acknowledge() is None
    apic.end(0x41)
    assert apic.acknowledge() == 0x4F


def test_vectors_of_the_lowest_class_never_interrupt() -> None:
    apic, _ = enabled()
    apic.accept(0x0F, True)
    assert apic.wanted is None
    apic.accept(0x10, True)
    assert apic.acknowledge() == 0x10


def test_the_end_of_a_vector_is_told_with_what_it_was_triggered_by() -> None:
    apic, ends = enabled()
    for level in (True, False):
        apic.accept(0x40, level)
        apic.acknowledge()
        apic.write(Offsets.EOI, 0)
    apic.write(Offsets.EOI, 0)
    assert ends == [(0x40, True), (0x40, False)]


def test_registers_are_where_the_manual_has_them() -> None:
    apic, _ = enabled()
    for vector in (0x21, 0x45, 0xFF):
        apic.accept(vector, vector == 0x45)
    assert apic.acknowledge() == 0xFF
    banks = {bank: [apic.read(bank + at) for at in range(0, 0x80, 0x10)] for bank in (0x100, 0x180, 0x200)}
    assert banks[0x100] == [0, 0, 0, 0, 0, 0, 0, 1 << 31]
    assert banks[0x180] == [0, 0, 1 << 5, 0, 0, 0, 0, 0]
    assert banks[0x200] == [0, 1 << 1, 1 << 5, 0, 0, 0, 0, 0]
    assert apic.read(Offsets.ID) == 3 << 24
    assert apic.read(Offsets.PPR) == 0xF0
    assert apic.read(Offsets.SVR) == 0x1FF
    apic.write(Offsets.LDR, 0x8000_0000)
    assert apic.read(Offsets.LDR) == 0x8000_0000
    assert apic.state().logical == 0x80
    apic.write(Offsets.ID, 5 << 24)
    assert apic.matches(5, False)
    apic.write(0x80, 0xFF)
    assert apic.read(0x80) == 0
    for beyond in (-1, 0x1000):
        with pytest.raises(IrqchipError) as error:
            apic.read(beyond)
        assert error.value.errno == errno.ENXIO
        with pytest.raises(IrqchipError):
            apic.write(beyond, 0)


def test_messages_are_for_it_by_id_by_logical_destination_or_for_all() -> None:
    apic, _ = enabled()
    apic.write(Offsets.LDR, 0x2 << 24)
    assert apic.matches(3, False)
    assert not apic.matches(2, False)
    assert apic.matches(0x6, True)
    assert not apic.matches(0x5, True)
    assert apic.matches(0xFF, False)
    assert apic.matches(0xFF, True)
