from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.limits import MAX_REGIONS
from protocol.region_offsets import INDICES, SHIFT, decode, encode

INDEX = st.integers(0, INDICES - 1)
OFFSET = st.integers(0, (1 << SHIFT) - 1)


@given(INDEX, OFFSET)
def test_what_is_encoded_is_decoded(index: int, offset: int) -> None:
    assert decode(encode(index, offset)) == (index, offset)


@given(st.integers(0, (1 << 63) - 1))
def test_every_position_is_one_byte_of_one_region(position: int) -> None:
    assert encode(*decode(position)) == position


@given(INDEX, OFFSET, INDEX, OFFSET)
def test_positions_are_in_the_order_of_regions_and_offsets(a: int, at: int, b: int, bt: int) -> None:
    assert (encode(a, at) < encode(b, bt)) is ((a, at) < (b, bt))


@pytest.mark.parametrize("index", range(MAX_REGIONS))
def test_every_region_that_a_device_may_have_has_a_place(index: int) -> None:
    assert encode(index) == index * 0x100_0000_0000
    assert decode(encode(index, 0xFF_FFFF_FFFF)) == (index, 0xFF_FFFF_FFFF)
    assert decode(encode(index) + (1 << 40)) == (index + 1, 0)


@pytest.mark.parametrize(("index", "offset"), [(0, 1 << 40), (0, -1), (-1, 0), (1 << 23, 0)])
def test_what_has_no_position_is_refused(index: int, offset: int) -> None:
    with pytest.raises(ValueError, match="has no position"):
        encode(index, offset)


@pytest.mark.parametrize("position", [-1, 1 << 63])
def test_what_is_no_position_in_a_file_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match="not a position"):
        decode(position)
