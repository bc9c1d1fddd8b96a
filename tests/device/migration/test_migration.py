"""A function that is moved: what goes over the arcs, and who is refused."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.dma import PinnedError
from device.errors import DeviceError
from device.function import Identity, PciFunction, ResetKind
from device.migration.sessions import MAX_STATE, PASSES_AHEAD
from device.migration.states import ARCS, DeviceState, MigrationFlags, path
from tests.device.driver_side import guest_memory
from tests.device.migration.moves import everything, load, move, saved
from tests.device.migration.rig import MEMORY_SIZE, Rig, rigs

S = DeviceState


def refused(action: Callable[[], object]) -> str | None:
    try:
        action()
    except DeviceError as error:
        assert error.errno == errno.EINVAL
        return str(error)
    return None


# --- arcs


def test_a_function_begins_running_and_says_what_it_can(source: Rig) -> None:
    assert source.stands == S.RUNNING
    assert source.migration.flags == MigrationFlags.STOP_COPY | MigrationFlags.PRE_COPY


@given(st.lists(st.integers(0, 7), max_size=12))
def test_any_wishes_end_in_the_state_that_the_rules_say(wanted: list[int]) -> None:
    with rigs(Rig()) as (rig,):
        for new in wanted:
            before = rig.migration.state
            try:
                steps = path(before, new)
            except DeviceError:
                assert refused(lambda new=new: rig.migration.set_state(new))  # type: ignore[misc]
                assert rig.stands == before
                continue
            if S.RESUMING in (before, *steps[:-1]) and steps:
                assert refused(lambda new=new: rig.migration.set_state(new))  # type: ignore[misc]
                assert rig.stands == S.ERROR
                assert not rig.function.running
                rig.function.reset(ResetKind.DEVICE)
            else:
                rig.migration.set_state(new)
                assert rig.migration.state == new
            assert rig.function.running == (rig.migration.state in (S.RUNNING, S.PRE_COPY))


def test_every_arc_of_the_table_is_walked(source: Rig) -> None:
    assert set(source.migration._actions) == {(here, there) for here, row in ARCS.items() for there in row}


@pytest.mark.parametrize(("before", "after"), [(S.RUNNING, S.STOP), (S.PRE_COPY, S.STOP_COPY)])
def test_a_function_does_not_stop_while_memory_is_held(
    source: Rig, before: DeviceState, after: DeviceState
) -> None:
    source.migration.set_state(before)
    with guest_memory(source.function.dma) as memory, source.function.dma.pin(memory.iova, 1, 1, "test"):
        assert source.migration.would_stop(after)
        with pytest.raises(PinnedError, match="test"):
            source.migration.set_state(after)
        assert (source.stands, source.function.running, source.happened) == (before, True, [])
    source.migration.set_state(after)
    assert source.happened == ["stop"]


def test_a_function_that_stands_still_goes_anywhere_whatever_is_held(source: Rig) -> None:
    source.migration.set_state(S.STOP)
    with guest_memory(source.function.dma) as memory, source.function.dma.pin(memory.iova, 1, 1, "test"):
        for state in (S.STOP_COPY, S.STOP, S.RUNNING, S.PRE_COPY, S.RUNNING):
            assert not source.migration.would_stop(state)
            source.migration.set_state(state)


def test_hooks_are_called_when_the_function_stops_and_runs(source: Rig) -> None:
    for state in (S.PRE_COPY, S.STOP_COPY, S.STOP, S.RUNNING, S.STOP, S.RUNNING):
        source.migration.set_state(state)
    assert source.happened == ["stop", "run", "stop", "run"]


@pytest.mark.parametrize("state", [S.STOP, S.PRE_COPY, S.STOP_COPY, S.RESUMING])
@pytest.mark.parametrize("kind", [ResetKind.DEVICE, ResetKind.LOST_CLIENT])
def test_a_reset_leads_back_to_running_and_power_on_values(
    source: Rig, state: DeviceState, kind: ResetKind
) -> None:
    fresh = source.seen()[:3]
    source.mark()
    source.migration.set_state(state)
    source.function.reset(kind)
    assert source.stands == S.RUNNING
    assert source.function.running
    assert source.seen()[:3] == fresh
    assert refused(lambda: source.migration.read(1))
    assert refused(lambda: source.migration.write(b""))


def test_a_function_level_reset_is_the_drivers_and_ends_no_migration(source: Rig, target: Rig) -> None:
    source.mark()
    source.migration.set_state(S.PRE_COPY)
    stream = everything(source.migration)
    source.function.reset(ResetKind.FLR)
    assert source.stands == S.PRE_COPY
    load(target.function, stream + saved(source.function, ahead=False))
    assert target.seen() == source.seen()
    source.migration.set_state(S.STOP)
    source.function.reset(ResetKind.FLR)
    assert source.stands == S.STOP
    assert not source.function.running


# --- data


@pytest.mark.parametrize("ahead", [True, False])
def test_everything_that_can_be_read_arrives(source: Rig, target: Rig, ahead: bool) -> None:
    source.mark()
    target.function.region_write(2, 777, b"of the target")
    move(source.function, target.function, ahead=ahead)
    assert target.seen() == source.seen()
    assert target.stands == S.RUNNING
    assert target.function.bus_master
    assert target.migration.arrivals == 1
    assert source.migration.arrivals == 0


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_pieces_may_be_of_any_size(source: Rig, target: Rig, size: int) -> None:
    source.mark()
    migration = source.migration
    migration.set_state(S.STOP_COPY)
    stream = b""
    while piece := migration.read(size):
        assert len(piece) <= size
        stream += piece
    load(target.function, stream, size)
    assert target.seen() == source.seen()


def test_reading_nothing_is_allowed_and_reading_less_is_not(source: Rig) -> None:
    source.migration.set_state(S.STOP_COPY)
    assert source.migration.read(0) == b""
    assert refused(lambda: source.migration.read(-1))
    assert len(everything(source.migration)) > 100
    assert source.migration.read(100) == b""


def test_memory_is_sent_ahead_and_then_only_what_changed(source: Rig, target: Rig) -> None:
    source.function.region_write(2, 0, b"x" * MEMORY_SIZE)
    source.migration.set_state(S.PRE_COPY)
    ahead = everything(source.migration)
    assert len(ahead) > MEMORY_SIZE
    assert source.migration.read(100) == b""
    source.function.region_write(2, 5000, b"y")
    source.migration.set_state(S.STOP_COPY)
    rest = everything(source.migration)
    assert 4096 < len(rest) < 3 * 4096
    load(target.function, ahead + rest)
    assert target.seen() == source.seen()


def test_memory_that_changes_is_sent_ahead_again_but_not_for_ever(source: Rig, target: Rig) -> None:
    source.migration.set_state(S.PRE_COPY)
    stream = everything(source.migration)
    passes = 0
    for value in range(2 * PASSES_AHEAD):
        source.function.region_write(2, 4096, bytes([value + 1]))
        assert source.migration.read(0) == b""
        again = everything(source.migration)
        assert everything(source.migration) == b""
        passes += bool(again)
        stream += again
    assert passes == PASSES_AHEAD
    load(target.function, stream + saved(source.function, ahead=False))
    assert target.seen() == source.seen()


def test_what_was_not_read_in_time_comes_after_the_stop(source: Rig, target: Rig) -> None:
    source.mark()
    source.function.region_write(2, 0, b"x" * MEMORY_SIZE)
    source.migration.set_state(S.PRE_COPY)
    ahead = source.migration.read(70_001)
    source.function.region_write(2, 0, b"y")
    load(target.function, ahead + saved(source.function, ahead=False))
    assert target.seen() == source.seen()


def test_the_state_is_that_of_the_moment_of_the_stop(source: Rig, target: Rig) -> None:
    source.mark()
    source.migration.set_state(S.STOP_COPY)
    before = source.seen()
    source.number.value += 1
    source.configure(0x3C, 1, 5)
    load(target.function, everything(source.migration))
    assert target.seen() == before


def test_a_source_whose_data_were_refused_goes_on(source: Rig, target: Rig) -> None:
    source.mark()
    before = source.seen()
    stream = saved(source.function)
    with pytest.raises(DeviceError):
        load(target.function, stream[:-1])
    source.migration.set_state(S.RUNNING)
    assert source.seen() == before
    assert source.happened == ["stop", "run"]
    target.function.reset(ResetKind.DEVICE)
    move(source.function, target.function)
    assert target.seen() == before


@pytest.mark.parametrize("state", [S.RUNNING, S.STOP, S.RESUMING])
def test_there_is_nothing_to_read_outside_the_saving_states(source: Rig, state: DeviceState) -> None:
    source.migration.set_state(state)
    assert refused(lambda: source.migration.read(100))


@pytest.mark.parametrize("state", [S.RUNNING, S.STOP, S.STOP_COPY, S.PRE_COPY])
def test_nothing_may_be_written_outside_resuming(source: Rig, state: DeviceState) -> None:
    source.migration.set_state(state)
    assert refused(lambda: source.migration.write(b"TRIONIC"))


# --- what is refused


def test_until_the_last_moment_nobody_sees_what_came(source: Rig, target: Rig) -> None:
    source.mark()
    before = target.seen()
    stream = saved(source.function)
    target.migration.set_state(S.RESUMING)
    target.migration.write(stream)
    assert target.seen() == before
    target.migration.set_state(S.STOP)
    assert target.seen() == source.seen()


@pytest.mark.parametrize("keep", [0, 1, 16, -1])
def test_a_state_that_breaks_off_leaves_an_error_and_the_function_as_it_was(
    source: Rig, target: Rig, keep: int
) -> None:
    source.mark()
    before = target.seen()
    stream = saved(source.function)[:keep]
    target.migration.set_state(S.RESUMING)
    target.migration.write(stream)
    assert "does not go on" in (refused(lambda: target.migration.set_state(S.RUNNING)) or "")
    assert target.stands == S.ERROR
    assert target.seen() == before
    for state in S:
        assert refused(lambda state=state: target.migration.set_state(state))  # type: ignore[misc]
    assert refused(lambda: target.migration.write(stream))
    target.function.reset(ResetKind.DEVICE)
    assert target.stands == S.RUNNING


@pytest.mark.parametrize(("device", "traits"), [(0x1000, None), (0x1041, {"colour": "red"}), (0x1041, {})])
def test_another_kind_of_function_is_refused_by_its_first_bytes(
    source: Rig, device: int, traits: dict[str, str] | None
) -> None:
    other = Rig(device=device, traits=traits)
    other.migration.set_state(S.RESUMING)
    source.migration.set_state(S.PRE_COPY)
    head = source.migration.read(16 + len(source.migration.identity))
    other.migration.write(head[:-1])
    assert "the cards differ" in (refused(lambda: other.migration.write(head[-1:])) or "")
    assert refused(lambda: other.migration.write(b""))
    assert refused(lambda: other.migration.set_state(S.STOP))
    assert other.stands == S.ERROR
    other.function.close()


STREAM_RIG = Rig()
STREAM_RIG.mark()
STREAM = saved(STREAM_RIG.function)
STREAM_RIG.function.close()


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(STREAM) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_a_stream_that_was_changed_anywhere_changes_nothing(changes: list[tuple[int, int]]) -> None:
    data = bytearray(STREAM)
    for at, difference in changes:
        data[at] ^= difference
    with rigs(Rig()) as (rig,):
        before = rig.seen()
        why = refused(lambda: load(rig.function, bytes(data)))
        if data == STREAM:
            return  # two changes that undo each other
        assert why
        assert rig.seen() == before


def test_a_stream_beyond_all_that_a_card_can_have_is_refused(source: Rig, target: Rig) -> None:
    page = bytes(16 - 8) + bytes(4096)
    section = b"MEM\0" + (16 + 4096).to_bytes(4, "little") + b"\2" + bytes(7) + page
    source.migration.set_state(S.PRE_COPY)
    target.migration.set_state(S.RESUMING)
    target.migration.write(everything(source.migration))
    sent = 0
    while not (why := refused(lambda: target.migration.write(section * 256))):
        sent += 256 * len(section)
    assert "more bytes" in why
    passes = PASSES_AHEAD + 1
    assert passes * MEMORY_SIZE < sent < (passes + 1) * MEMORY_SIZE + MAX_STATE


@pytest.mark.parametrize(
    ("section", "why"),
    [
        (b"MEM\0" + (16 + 4096).to_bytes(4, "little") + b"\0" + bytes(15 + 4096), "no memory in BAR 0"),
        (b"MEM\0" + (16 + 100).to_bytes(4, "little") + b"\2" + bytes(15 + 100), "100 bytes at 0x0"),
        (b"MEM\0" + (3).to_bytes(4, "little") + bytes(3), "3 bytes of memory"),
        (b"NUMB" + (7).to_bytes(4, "little") + bytes(7), "7 bytes are no number"),
        (2 * (b"NUMB" + (8).to_bytes(4, "little") + bytes(8)), "comes twice"),
        (b"WHAT" + (0).to_bytes(4, "little"), "b'WHAT' of 0 bytes"),
        (b"CONF" + (1).to_bytes(4, "little") + b"\1", "software cannot set"),
        (b"CONF" + (4097).to_bytes(4, "little") + bytes(4097), "software cannot set"),
        (b"IRQS" + (1).to_bytes(4, "little") + b"\0", "neither high nor low"),
        (b"IRQS" + (6).to_bytes(4, "little") + b"\0\0\0\0\0\2", "MSI-X entries"),
    ],
)
def test_a_section_that_no_card_writes_is_refused_when_it_comes(
    source: Rig, target: Rig, section: bytes, why: str
) -> None:
    source.migration.set_state(S.PRE_COPY)
    target.migration.set_state(S.RESUMING)
    target.migration.write(everything(source.migration))
    assert why in (refused(lambda: target.migration.write(section)) or "")


def test_a_state_without_one_of_its_parts_is_refused(source: Rig, target: Rig) -> None:
    del source.migration.parts[b"NUMB"]
    assert "without parts [b'NUMB']" in (refused(lambda: move(source.function, target.function)) or "")
    assert target.stands == S.ERROR


def test_a_part_that_fails_against_its_promise_leaves_an_error(
    source: Rig, target: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def apply() -> None:
        raise RuntimeError("a mistake in the card's code")

    monkeypatch.setattr(target.number, "stage", lambda _data: apply)
    with pytest.raises(RuntimeError):
        move(source.function, target.function)
    assert target.stands == S.ERROR
    assert not target.function.running


@pytest.mark.parametrize(("state", "running"), [(S.PRE_COPY, True), (S.STOP, False)])
def test_a_part_that_cannot_be_saved_leaves_the_function_as_its_state_says(
    source: Rig, monkeypatch: pytest.MonkeyPatch, state: DeviceState, running: bool
) -> None:
    def fail() -> bytes:
        raise MemoryError

    source.migration.set_state(state)
    monkeypatch.setattr(source.number, "save", fail)
    with pytest.raises(MemoryError):
        source.migration.set_state(S.STOP_COPY)
    assert (source.migration.state, source.function.running) == (state, running)


def test_a_function_without_a_migration_has_none() -> None:
    function = PciFunction("plain", Identity(1, 2, 3, 4))
    assert function.migration is None
    function.reset(ResetKind.DEVICE)
    function.close()
