from dataclasses import fields

from hypothesis import given
from hypothesis import strategies as st

from client.kvm import _abi
from client.kvm.state import IoapicState, Pic8259State, RedirectionEntry

EIGHT_BITS = st.integers(0, 0xFF)

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
