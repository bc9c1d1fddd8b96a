"""Pins counted in the kernel's two ways, against models that count one by one."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from device.dma._counts import (
    GUP_PIN_COUNTING_BIAS,
    MAX_PAGE_PINS,
    SMALL_PAGE,
    BiasedCount,
    ExactCount,
    PinnedPages,
)
from device.errors import DeviceError

LARGE = 8 * SMALL_PAGE

users = st.lists(st.sampled_from(["get", "put", "pin", "unpin"]), max_size=200)


def counted(page: BiasedCount | ExactCount, uses: list[str]) -> tuple[int, int]:
    """Let everybody use the page who may, and undo only what was done; how many have got and pinned it."""
    got = pinned = 0
    for use in uses:
        if use == "get":
            page.get()
            got += 1
        elif use == "pin":
            page.pin()
            pinned += 1
        elif use == "put" and got:
            page.put()
            got -= 1
        elif use == "unpin" and pinned:
            page.unpin()
            pinned -= 1
        assert page.maybe_pinned or not pinned
    return got, pinned


@given(users)
def test_a_pin_of_a_small_page_is_never_overlooked(uses: list[str]) -> None:
    page = BiasedCount()
    got, pinned = counted(page, uses)
    assert page.references == 1 + got + GUP_PIN_COUNTING_BIAS * pinned
    for _ in range(pinned):
        page.unpin()
    for _ in range(got):
        page.put()
    assert (page.references, page.maybe_pinned) == (1, False)


@given(users)
def test_a_large_page_is_pinned_exactly_when_somebody_pins_it(uses: list[str]) -> None:
    page = ExactCount()
    got, pinned = counted(page, uses)
    assert (page.pins, page.references, page.maybe_pinned) == (pinned, 1 + got + pinned, pinned > 0)


def test_many_who_refer_to_a_small_page_look_like_a_pin_and_to_a_large_one_do_not() -> None:
    small, large = BiasedCount(), ExactCount()
    for _ in range(GUP_PIN_COUNTING_BIAS - 2):
        small.get()
        large.get()
    assert (small.maybe_pinned, large.maybe_pinned) == (False, False)
    small.get()
    large.get()
    assert (small.maybe_pinned, large.maybe_pinned) == (True, False)


def test_a_small_page_is_pinned_so_often_and_no_more() -> None:
    page = BiasedCount()
    for _ in range(MAX_PAGE_PINS):
        page.pin()
    assert page.maybe_pinned  # though the number is below zero for who takes it as signed
    for more in (page.pin, page.get):
        with pytest.raises(DeviceError) as refused:
            more()
        assert refused.value.errno == errno.ENOMEM
    page.unpin()
    page.pin()
    for _ in range(MAX_PAGE_PINS):
        page.unpin()
    assert page.references == 1


def test_a_large_page_is_pinned_more_often_than_a_small_one_can_be() -> None:
    page = ExactCount()
    page.pin(512 * (MAX_PAGE_PINS + 1))
    assert page.pins == 512 * (MAX_PAGE_PINS + 1)


def test_pins_of_the_page_of_zeros_leave_no_trace() -> None:
    page = BiasedCount(zero_page=True)
    page.pin()
    assert (page.references, page.maybe_pinned) == (1, False)
    page.unpin()
    page.unpin()
    assert page.references == 1


@pytest.mark.parametrize("make", [BiasedCount, ExactCount])
def test_what_nobody_has_done_is_not_undone(make: type[BiasedCount] | type[ExactCount]) -> None:
    page = make()
    with pytest.raises(ValueError, match="got"):
        page.put()
    with pytest.raises(ValueError, match="pinned"):
        page.unpin()
    assert page.references == 1


# --- the pages of a file


@pytest.mark.parametrize("size", [0, 1, 2048, 4095, 3 * SMALL_PAGE])
def test_pages_have_a_size_that_memory_can_have(size: int) -> None:
    with pytest.raises(ValueError, match="pages"):
        PinnedPages(size)


def test_a_span_costs_the_same_however_long_it_is() -> None:
    pages = PinnedPages(SMALL_PAGE)
    pages.pin(SMALL_PAGE, 1 << 43)
    assert pages.runs == 3
    assert pages.maybe_pinned(1 << 42)
    assert not pages.maybe_pinned(0)
    assert not pages.maybe_pinned((1 << 43) + SMALL_PAGE)
    pages.unpin(SMALL_PAGE, 1 << 43)
    assert (pages.runs, pages.spans) == (1, 0)
    with pytest.raises(ValueError, match="pinned"):
        pages.unpin(SMALL_PAGE, 1 << 43)


def test_a_page_in_a_file_is_not_pinned_too_often_and_then_nothing_is() -> None:
    pages = PinnedPages(SMALL_PAGE)
    for _ in range(MAX_PAGE_PINS):
        pages.pin(5 * SMALL_PAGE, 1)
    with pytest.raises(DeviceError) as refused:
        pages.pin(0, 10 * SMALL_PAGE)
    assert refused.value.errno == errno.ENOMEM
    assert not pages.maybe_pinned(0)
    assert pages.maybe_pinned(5 * SMALL_PAGE)


class Pages(RuleBasedStateMachine):
    """Spans of a file that come and go in any order, beside a list of them."""

    spans = Bundle("spans")
    page_size = SMALL_PAGE

    def __init__(self) -> None:
        super().__init__()
        self.pages = PinnedPages(self.page_size)
        self.pinned: list[tuple[int, int]] = []

    @rule(target=spans, offset=st.integers(0, 40 * SMALL_PAGE), length=st.integers(1, 30 * SMALL_PAGE))
    def pin(self, offset: int, length: int) -> tuple[int, int]:
        self.pages.pin(offset, length)
        self.pinned.append((offset, length))
        return offset, length

    @rule(span=consumes(spans))
    def unpin(self, span: tuple[int, int]) -> None:
        self.pages.unpin(*span)
        self.pinned.remove(span)

    @invariant()
    def a_page_is_pinned_exactly_if_a_span_has_a_byte_of_it(self) -> None:
        for start in range(0, 80 * SMALL_PAGE, self.page_size):
            end = start + self.page_size
            there = any(offset < end and offset + length > start for offset, length in self.pinned)
            assert self.pages.maybe_pinned(start) == self.pages.maybe_pinned(end - 1) == there

    @invariant()
    def runs_are_as_many_as_there_are_ends_at_most(self) -> None:
        assert self.pages.spans == len(self.pinned)
        assert self.pages.runs <= 1 + 6 * len(self.pinned)


class LargePages(Pages):
    page_size = LARGE


TestPagesOfAFile = Pages.TestCase
TestLargePagesOfAFile = LargePages.TestCase
