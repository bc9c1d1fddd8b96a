"""The table of windows behind `DmaWindows`: its order, what a change has to move, and what it takes."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.dma import MAX_WINDOWS, PAGE_SIZE, DmaWindows
from device.errors import DeviceError

BLOCK = 256
"""Rows of a block (device/dma/_table.pxd, BLOCK_ROWS)."""

BLOCK_BYTES = 8 + BLOCK * 40
SPACING = 2 * PAGE_SIZE
MANY = 262_144
ORDERS = ("ascending", "descending", "random", "from the middle")


def in_order(order: str, count: int) -> list[int]:
    """Numbers below `count`."""
    numbers = list(range(count))
    if order == "descending":
        numbers.reverse()
    elif order == "random":
        random.Random(count).shuffle(numbers)
    elif order == "from the middle":
        half = count // 2
        numbers = [n for pair in zip(range(half, count), reversed(range(half)), strict=True) for n in pair]
    return numbers


def mapped(numbers: Iterable[int], dma: DmaWindows | None = None) -> DmaWindows:
    """Windows of a page, each at a multiple of two pages."""
    dma = dma or DmaWindows()
    for number in numbers:
        dma.map(number * SPACING, PAGE_SIZE, 3)
    return dma


def blocks(dma: DmaWindows) -> int:
    """As many blocks as it has, or a few more."""
    return dma.table_bytes // BLOCK_BYTES


RUN = st.tuples(
    st.sampled_from(("ascending", "descending", "random")),
    st.integers(0, 900),
    st.integers(1, 700),
    st.integers(1, 3),
    st.integers(0, 2**16),
)


@given(st.lists(st.tuples(st.booleans(), RUN), min_size=1, max_size=8))
def test_many_windows_equal_a_sorted_list(changes: list[tuple[bool, tuple[str, int, int, int, int]]]) -> None:
    dma = DmaWindows()
    model: set[int] = set()
    for mapping, (order, start, count, step, seed) in changes:
        if mapping:
            numbers = [start + step * number for number in range(count)]
            if order == "descending":
                numbers.reverse()
            elif order == "random":
                random.Random(seed).shuffle(numbers)
            for number in numbers:
                if number in model:
                    with pytest.raises(DeviceError) as refused:
                        dma.map(number * SPACING, PAGE_SIZE, 3)
                    assert refused.value.errno == errno.EEXIST
                else:
                    dma.map(number * SPACING, PAGE_SIZE, 3)
            model.update(numbers)
        else:
            inside = {number for number in model if start <= number < start + count}
            assert dma.unmap(start * SPACING, count * SPACING) == len(inside) * PAGE_SIZE
            model -= inside
        ordered = sorted(model)
        assert [window[0] // SPACING for window in dma.windows()] == ordered
        assert len(dma) == len(model)
        assert dma.table_bytes <= 4 * 40 * len(model) + 2 * BLOCK_BYTES + 16 * 64
        for number in (start, start + count, *ordered[:: max(1, len(ordered) // 50)]):
            for at in (number * SPACING, number * SPACING + PAGE_SIZE - 1):
                assert dma.still_asked(dma.epoch, at, 1, 3) == (number in model)
            assert not dma.still_asked(dma.epoch, number * SPACING + PAGE_SIZE, 1, 3)


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_change_moves_does_not_grow_with_the_number_of_windows(order: str) -> None:
    averages = {}
    for count in (MANY // 16, MANY):
        numbers = in_order(order, count)
        dma = mapped(numbers[:-4096])
        start = before = dma.moved
        worst = 0
        for number in numbers[-4096:]:
            mapped([number], dma)
            worst = max(worst, dma.moved - before)
            before = dma.moved
        for number in numbers[:4096]:
            dma.unmap(number * SPACING, PAGE_SIZE)
            worst = max(worst, dma.moved - before)
            before = dma.moved
        averages[count] = (dma.moved - start) / 8192
        # A block, half of one for its division, and the list of all blocks.
        assert worst <= 2 * BLOCK + blocks(dma)
    assert averages[MANY] <= BLOCK
    assert averages[MANY] <= 1.25 * averages[MANY // 16] + 16


@pytest.mark.parametrize(("order", "each"), [("ascending", 41), ("descending", 41), ("random", 62)])
def test_a_window_takes_so_many_bytes(order: str, each: int) -> None:
    dma = mapped(in_order(order, MANY))
    assert dma.table_bytes <= each * MANY


@pytest.mark.parametrize("kept", [1, 100, 300])
def test_what_windows_took_is_given_back_with_them(kept: int) -> None:
    dma = mapped(range(65_535))
    for number in range(65_535):
        if number % kept != kept - 1 or kept == 1:
            dma.unmap(number * SPACING, PAGE_SIZE)
    left = 0 if kept == 1 else 65_535 // kept
    assert len(dma) == left
    assert blocks(dma) <= 4 * left // BLOCK + 2


def test_a_span_that_matches_nothing_leaves_the_table_and_whoever_looked_at_it_alone() -> None:
    dma = mapped(range(65_535))
    before = (dma.moved, dma.generation, dma.epoch)
    top = 1 << 47
    for bits in range(30, 48):
        assert dma.unmap(1 << bits, 1 << bits) == 0
    assert dma.unmap(top, top) == 0
    assert dma.unmap(top, (1 << 64) - top) == 0
    assert dma.unmap(PAGE_SIZE, PAGE_SIZE) == 0
    assert (dma.moved, dma.generation, dma.epoch, len(dma)) == (*before, 65_535)


def test_a_span_of_many_windows_is_taken_out_in_one_piece() -> None:
    dma = mapped(range(65_535))
    before = dma.moved
    assert dma.unmap(1000 * SPACING, 60_000 * SPACING) == 60_000 * PAGE_SIZE
    assert dma.moved - before <= 2 * BLOCK + blocks(dma)
    assert len(dma) == 5535
    assert dma.unmap(0, 0x8000_0000_0000) == 5535 * PAGE_SIZE
    assert (len(dma), dma.windows(), blocks(dma) <= 1) == (0, [], True)


def test_windows_at_both_ends_of_a_span_are_not_cut_however_many_are_between() -> None:
    dma = mapped(range(65_535))
    dma.map(65_535 * SPACING, 2 * PAGE_SIZE, 3)
    for at, size in (
        (0, 65_535 * SPACING + PAGE_SIZE),
        (SPACING + 1, 0x8000_0000_0000),
        (SPACING, 99 * SPACING + 1),
        (65_535 * SPACING + PAGE_SIZE, 1 << 40),
    ):
        with pytest.raises(DeviceError) as refused:
            dma.unmap(at, size)
        assert refused.value.errno == errno.EINVAL
    assert len(dma) == 65_536


def test_the_last_window_may_end_where_the_address_space_does() -> None:
    dma = mapped(range(1000))
    top = (1 << 64) - PAGE_SIZE
    dma.map(top, PAGE_SIZE, 3)
    assert dma.unmap(top, PAGE_SIZE) == PAGE_SIZE
    dma.map(top, PAGE_SIZE, 3)
    assert dma.unmap(SPACING, (1 << 64) - SPACING) == 1000 * PAGE_SIZE
    assert [window[0] for window in dma.windows()] == [0]


def test_one_window_more_than_a_table_holds_is_refused() -> None:
    dma = mapped(range(MAX_WINDOWS))
    with pytest.raises(DeviceError) as refused:
        mapped([MAX_WINDOWS], dma)
    assert refused.value.errno == errno.ENOSPC
    assert dma.unmap_all() == MAX_WINDOWS
    mapped([MAX_WINDOWS], dma)
