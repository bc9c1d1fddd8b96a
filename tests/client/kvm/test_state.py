from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from client.kvm import _abi
from client.kvm.state import IoapicState, Pic8259State, PicState, RedirectionEntry

EIGHT_BITS = st.integers(0, 0xFF)

RESERVED = 0x00FF_FFFF_FFFE_0000
"""Bits 17 to 55 of a redirection entry (82093AA, 3.2.4)."""

ENTRIES = st.builds(
    RedirectionEntry,
    vector=EIGHT_BITS,
    delivery_mode=st.integers(0, 7),
    logical=st.booleans(),
    sending=st.booleans(),
    active_low=st.booleans(),
    remote_irr=st.booleans(),
    level=st.booleans(),
    masked=st.booleans(),
    destination=EIGHT_BITS,
)


@given(ENTRIES)
def test_a_redirection_entry_comes_back_from_its_register(entry: RedirectionEntry) -> None:
    assert RedirectionEntry.unpack(entry.pack()) == entry


@given(st.integers(0, (1 << 64) - 1))
def test_a_redirection_register_comes_back_without_its_reserved_bits(value: int) -> None:
    assert RedirectionEntry.unpack(value).pack() == value & ~RESERVED


def test_a_redirection_register_is_told_by_its_bits() -> None:
    entry = RedirectionEntry.unpack(0x0500_0000_0001_E94A)
    assert entry == RedirectionEntry(
        vector=0x4A,
        delivery_mode=1,
        logical=True,
        sending=False,
        active_low=True,
        remote_irr=True,
        level=True,
        masked=True,
        destination=5,
    )


@given(
    st.builds(
        IoapicState,
        base_address=st.integers(0, (1 << 64) - 1),
        ioregsel=st.integers(0, (1 << 32) - 1),
        id=st.integers(0, 15),
        irr=st.integers(0, (1 << 24) - 1),
        entries=st.tuples(*[ENTRIES] * _abi.IOAPIC_PINS),
    )
)
def test_the_state_of_an_ioapic_comes_back_from_its_structure(state: IoapicState) -> None:
    assert IoapicState.unpack(state.pack()) == state


def test_the_state_of_a_pic_has_kvms_names_in_kvms_order() -> None:
    names = [field.name for field in fields(Pic8259State)]
    assert names == [field[0] for field in _abi.PicRegisters._fields_]
    state = Pic8259State.unpack(bytes(range(1, 17)))
    assert (state.last_irr, state.irr, state.elcr, state.elcr_mask) == (1, 2, 15, 16)


def test_a_pair_of_pics_has_sixteen_inputs() -> None:
    master, slave = (
        Pic8259State.unpack(
            bytes(_abi.PicRegisters(irr=irr, isr=irr + 1, imr=irr + 2, elcr=irr + 3, irq_base=8))
        )
        for irr in (0x10, 0x20)
    )
    pic = PicState(master, slave)
    assert (pic.irr, pic.isr, pic.imr, pic.elcr) == (0x2010, 0x2111, 0x2212, 0x2313)
