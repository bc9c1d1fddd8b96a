"""Registers that are declared as data."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.declared import DeclaredRegisters, Register

TABLE = (
    Register("plain", 0x00, 4),
    Register("fixed", 0x04, 2, writable=False),
    Register("many", 0x08, 2, index=0),
    Register("many", 0x0A, 2, index=1),
    Register("wide", 0x10, 8),
)
SIZE = 0x18


class Kept:
    """Registers that keep what is written."""

    def __init__(self) -> None:
        self.values = {"plain": 0, "wide": 0, 0: 0, 1: 0}
        self.order: list[int] = []

    def _get_plain(self) -> int:
        return self.values["plain"]

    def _set_plain(self, value: int) -> None:
        self.values["plain"] = value

    def _get_fixed(self) -> int:
        return 0xBEEF

    def _get_many(self, index: int) -> int:
        return self.values[index]

    def _set_many(self, index: int, value: int) -> None:
        self.order.append(index)
        self.values[index] = value

    def _get_wide(self) -> int:
        return self.values["wide"]

    def _set_wide(self, value: int) -> None:
        self.values["wide"] = value


accesses = st.sampled_from([1, 2, 4, 8]).flatmap(
    lambda count: st.tuples(st.integers(0, SIZE // count - 1).map(lambda at: at * count), st.just(count))
)


@given(st.lists(st.tuples(accesses, st.integers(0, 2**64 - 1)), max_size=12))
def test_any_accesses_behave_as_bytes_of_which_some_are_fixed(
    written: list[tuple[tuple[int, int], int]],
) -> None:
    registers = DeclaredRegisters(TABLE, Kept())
    model = bytearray(SIZE)
    model[4:6] = (0xBEEF).to_bytes(2, "little")
    kept = {*range(4), *range(8, 12), *range(16, 24)}
    for (offset, count), value in written:
        data = (value & (1 << 8 * count) - 1).to_bytes(count, "little")
        registers.write(offset, count, int.from_bytes(data, "little"))
        for at, byte in enumerate(data, offset):
            if at in kept:
                model[at] = byte
        for size in (1, 2, 4, 8):
            for at in range(0, SIZE, size):
                assert registers.read(at, size) == int.from_bytes(model[at : at + size], "little")


def test_a_wide_access_writes_the_lower_register_first() -> None:
    owner = Kept()
    DeclaredRegisters(TABLE, owner).write(0x08, 4, 0x0002_0001)
    assert owner.order == [0, 1]
    assert (owner.values[0], owner.values[1]) == (1, 2)


def test_registers_one_over_another_are_refused() -> None:
    with pytest.raises(ValueError, match="wide at 0x3 overlaps plain"):
        DeclaredRegisters([TABLE[0], Register("wide", 3, 8)], Kept())
