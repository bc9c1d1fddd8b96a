"""The state machine, against a second reading of the specification."""

import errno
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.migration.states import ARCS, DeviceState, MigrationFlags, path

S = DeviceState
USED = [S.RUNNING, S.STOP, S.STOP_COPY, S.RESUMING, S.PRE_COPY]

# The arcs as "Direct State Transitions" lists them, one arrow each.
ARROWS = {
    tuple(arrow.split(" -> "))
    for arrow in (
        "RUNNING -> STOP",
        "STOP_COPY -> STOP",
        "RESUMING -> STOP",
        "PRE_COPY -> RUNNING",
        "STOP -> RUNNING",
        "RUNNING -> PRE_COPY",
        "STOP -> STOP_COPY",
        "PRE_COPY -> STOP_COPY",
        "STOP -> RESUMING",
    )
}

# What the kernel's list of combinations comes to without peer-to-peer states (vfio_mig_get_next_state).
COMBINED = {
    tuple(combination.split(" "))
    for combination in (
        "PRE_COPY RUNNING STOP",
        "PRE_COPY RUNNING STOP RESUMING",
        "RESUMING STOP RUNNING",
        "RESUMING STOP RUNNING PRE_COPY",
        "RESUMING STOP STOP_COPY",
        "RUNNING STOP RESUMING",
        "RUNNING STOP STOP_COPY",
        "STOP RUNNING PRE_COPY",
        "STOP_COPY STOP RESUMING",
        "STOP_COPY STOP RUNNING",
    )
}


def way(start: DeviceState, end: int) -> tuple[str, ...] | None:
    try:
        return tuple(state.name for state in path(start, end))
    except DeviceError as refusal:
        assert refusal.errno == errno.EINVAL
        return None


def ways_of_the_specification(start: str, end: str) -> list[tuple[str, ...]]:
    """Every way without a state twice and without a saving state inside, the shortest only."""
    found: list[tuple[str, ...]] = []

    def walk(way: tuple[str, ...]) -> None:
        if way[-1] == end:
            found.append(way)
            return
        if len(way) > 1 and way[-1] in ("PRE_COPY", "STOP_COPY"):
            return
        for here, following in ARROWS:
            if here == way[-1] and following not in way:
                walk((*way, following))

    walk((start,))
    return [way for way in found if len(way) == min(map(len, found))]


def test_the_table_is_the_list_of_the_specification() -> None:
    assert {(here.name, following.name) for here, row in ARCS.items() for following in row} == ARROWS


@pytest.mark.parametrize(("start", "end"), list(product(USED, USED)))
def test_every_pair_of_states_has_the_way_that_the_rules_choose_or_none(
    start: DeviceState, end: DeviceState
) -> None:
    expected = ways_of_the_specification(start.name, end.name)
    if (start, end) == (S.STOP_COPY, S.PRE_COPY):
        assert way(start, end) is None
    else:
        assert len(expected) == 1  # the rules leave no choice
        assert way(start, end) == expected[0][1:]


def test_the_ways_of_more_than_one_arc_are_the_kernels() -> None:
    longer = {
        (start.name, *found)
        for start, end in product(USED, USED)
        if (found := way(start, end)) is not None and len(found) > 1
    }
    assert longer == COMBINED


@pytest.mark.parametrize("other", list(DeviceState))
def test_error_is_neither_left_nor_asked_for(other: DeviceState) -> None:
    assert way(S.ERROR, other) is None
    assert way(other, S.ERROR) is None


@pytest.mark.parametrize("absent", [S.RUNNING_P2P, S.PRE_COPY_P2P])
@pytest.mark.parametrize("other", list(DeviceState))
def test_peer_to_peer_states_are_not_offered(absent: DeviceState, other: DeviceState) -> None:
    assert way(other, absent) is None
    assert way(absent, other) is None


@pytest.mark.parametrize("number", [-1, 8, 255, 1 << 31])
def test_numbers_of_no_state_are_refused(number: int) -> None:
    assert all(way(state, number) is None for state in DeviceState)


@given(st.lists(st.sampled_from(USED), max_size=30))
def test_any_walk_uses_direct_arcs_only(wanted: list[DeviceState]) -> None:
    here = S.RUNNING
    for end in wanted:
        try:
            steps = path(here, end)
        except DeviceError:
            assert (here, end) == (S.STOP_COPY, S.PRE_COPY)
            continue
        assert all((a.name, b.name) in ARROWS for a, b in pairwise((here, *steps)))
        here = end


def test_numbers_are_those_of_the_kernels_header() -> None:
    assert [state.value for state in DeviceState] == list(range(8))
    assert (MigrationFlags.STOP_COPY, MigrationFlags.P2P, MigrationFlags.PRE_COPY) == (1, 2, 4)
