from __future__ import annotations

import random
import sys
from types import FrameType
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.errors import ClientError
from client.iova import FIRST, HOLES, LAST, TIGHT_FITS, IovaSpace

if TYPE_CHECKING:
    from _typeshed import TraceFunction


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


@pytest.mark.parametrize("length", [0, -1])
def test_no_addresses_are_none_that_can_be_had(length: int) -> None:
    for at in (None, 0x5000):
        with pytest.raises(ClientError, match="I/O addresses"):
            IovaSpace().take(length, at=at)


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


def test_what_was_not_handed_out_is_not_taken_back() -> None:
    space = IovaSpace()
    start = space.take(8192)
    for address, length in ((start, 4096), (start + 4096, 4096), (0x5000, 4096)):
        with pytest.raises(ValueError, match="handed out"):
            space.give(address, length)


def test_an_address_outside_the_usual_ones_may_be_asked_for_and_given_back() -> None:
    space = IovaSpace()
    around_the_first = space.take(0x2000, at=FIRST - 0x1000)
    beyond = space.take(0x2000, at=LAST - 0x1000)
    assert space.take(4096) == FIRST + 0x1000
    space.give(around_the_first, 0x2000)
    space.give(beyond, 0x2000)
    assert space.take(4096) == FIRST
    assert space.take(0x2000, at=LAST) == LAST


def test_a_gap_that_only_just_fits_is_found_behind_many_that_do_not() -> None:
    space = IovaSpace()
    space.take(LAST - (1 << 32), at=1 << 32)
    space.take(HOLES[0][0] - FIRST, at=FIRST)
    space.take((1 << 32) - HOLES[0][1], at=HOLES[0][1])
    start, odd = 1 << 33, 2 * TIGHT_FITS
    space.give(1 << 32, LAST - (1 << 32))
    for number in range(odd):  # each a gap of 64 KiB that lies across the 64 KiB
        space.take(0x10000 + 0x1000, at=start + number * 0x21000 + 0x10000 + 0x1000 * (number % 2))
    fits = max(space.take(0x10000, align=0x10000) for _ in range(4))
    assert fits % 0x10000 == 0


def lines_of_python(count: int) -> int:
    """How many lines run when one of so many scattered addresses goes and two others are handed out."""
    space = IovaSpace()
    order = random.Random(count).sample(range(count), count)
    for number in order:
        space.take(4096, at=FIRST + number * 8192)
    lines = 0

    def count_lines(frame: FrameType, event: str, argument: object) -> TraceFunction:
        nonlocal lines
        lines += event == "line"
        return count_lines

    sys.settrace(count_lines)
    try:
        space.give(FIRST + order[0] * 8192, 4096)
        space.take(4096)
        space.take(1 << 21, align=1 << 21)
    finally:
        sys.settrace(None)
    return lines


def test_an_address_takes_hardly_more_steps_among_65536_than_among_1024() -> None:
    assert lines_of_python(1 << 16) < 2 * lines_of_python(1 << 10)


def test_large_pages_are_aligned_to_themselves() -> None:
    space = IovaSpace()
    assert space.take(1 << 30, align=1 << 30) == 1 << 30
    assert space.take(1 << 30, align=1 << 30) == 2 << 30
    assert space.take(1 << 30, align=1 << 30) == 4 << 30, "the hole below 4 GiB is in the way"
