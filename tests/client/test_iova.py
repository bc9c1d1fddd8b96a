from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.errors import ClientError
from client.iova import FIRST, HOLES, LAST, IovaSpace


def test_ranges_do_not_touch_each_other_and_come_back() -> None:
    space = IovaSpace()
    first, second = space.take(8192), space.take(4096)
    assert first == FIRST
    assert second == first + 8192
    space.give(first, 8192)
    assert space.take(8192) == first


def test_an_address_may_be_asked_for_once() -> None:
    space = IovaSpace()
    assert space.take(4096, at=0x5000) == 0x5000
    with pytest.raises(ClientError, match="in use"):
        space.take(4096, at=0x4001)


def test_a_space_can_be_full() -> None:
    with pytest.raises(ClientError, match="are free"):
        IovaSpace().take(LAST)


@given(st.lists(st.tuples(st.integers(1, 1 << 33), st.sampled_from([4096, 1 << 21])), max_size=20), st.data())
def test_no_two_ranges_overlap(wanted: list[tuple[int, int]], data: st.DataObject) -> None:
    space = IovaSpace()
    held: list[tuple[int, int]] = []
    for length, align in wanted:
        start = space.take(length, align=align)
        assert start % align == 0
        for other, size in [*held, *((low, high - low) for low, high in HOLES)]:
            assert start + length <= other or other + size <= start
        held.append((start, length))
        if data.draw(st.booleans()):
            space.give(*held.pop(data.draw(st.integers(0, len(held) - 1))))


def test_large_pages_are_aligned_to_themselves() -> None:
    space = IovaSpace()
    assert space.take(1 << 30, align=1 << 30) == 1 << 30
    assert space.take(1 << 30, align=1 << 30) == 2 << 30
    assert space.take(1 << 30, align=1 << 30) == 4 << 30, "the hole below 4 GiB is in the way"
