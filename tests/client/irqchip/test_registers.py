from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from client.irqchip.registers import Pic8259State, PicState, RedirectionEntry

RESERVED = 0x00FF_FFFF_FFFE_0000


@given(st.integers(0, 2**64 - 1))
def test_an_entry_is_the_register_without_what_is_reserved(value: int) -> None:
    assert RedirectionEntry.unpack(value).pack() == value & ~RESERVED


def test_the_bits_of_an_entry_are_where_the_data_sheet_has_them() -> None:
    entry = RedirectionEntry(0x12, 5, True, True, True, True, True, True, 0x34)
    assert entry.pack() == 0x3400_0000_0001_FD12
    assert RedirectionEntry().pack() == 1 << 16


def test_inputs_of_both_halves_are_numbered_through() -> None:
    state = PicState(
        Pic8259State(irr=1, isr=2, imr=4, elcr=8), Pic8259State(irr=16, isr=32, imr=64, elcr=128)
    )
    assert (state.irr, state.isr, state.imr, state.elcr) == (0x1001, 0x2002, 0x4004, 0x8008)
