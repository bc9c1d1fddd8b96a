from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client._spans import Spans

RANGES = st.tuples(st.integers(0, 60), st.integers(1, 9)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(st.tuples(st.booleans(), RANGES)), RANGES)
def test_the_table_equals_a_list(steps: list[tuple[bool, tuple[int, int]]], asked: tuple[int, int]) -> None:
    spans: Spans[int] = Spans()
    held: list[tuple[int, int, int]] = []
    for number, (adding, (start, end)) in enumerate(steps):
        if adding:
            try:
                spans.add(start, end, number)
                assert not any(low < end and start < high for low, high, _ in held)
                held.append((start, end, number))
            except ValueError:
                assert any(low < end and start < high for low, high, _ in held)
        elif spans.get(start) is not None:
            gone = spans.remove(start)
            held = [one for one in held if one[2] != gone]
    assert len(spans) == len(held)
    assert list(spans) == [number for _, _, number in sorted(held)]
    for address in range(75):
        inside = [one for one in held if one[0] <= address < one[1]]
        assert spans.find(address) == (inside[0] if inside else None)
    start, end = asked
    crossing = [one for one in sorted(held) if one[0] < end and start < one[1]]
    assert list(spans.overlapping(start, end)) == crossing
    assert spans.overlap(start, end) == bool(crossing)


def test_an_empty_range_is_nobodys() -> None:
    with pytest.raises(ValueError, match="up to"):
        Spans[None]().add(5, 5, None)


def test_what_is_not_there_cannot_be_removed() -> None:
    spans: Spans[None] = Spans()
    spans.add(5, 7, None)
    with pytest.raises(KeyError):
        spans.remove(6)
