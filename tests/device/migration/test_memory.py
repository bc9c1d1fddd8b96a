"""Which pages of on-card memory travel, and that they arrive."""

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.migration.memory import PAGE, RUN, MemorySource, MemoryTarget, split
from device.pci.memory_bar import MemoryBar

SIZE = 1 << 20


@pytest.fixture
def bar() -> Iterator[MemoryBar]:
    made = MemoryBar(2, SIZE)
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[MemoryBar]:
    made = MemoryBar(2, SIZE)
    yield made
    made.close()


def payloads(source: MemorySource) -> list[bytes]:
    return [payload for payload in source.changed() if payload is not None]


def move(source: MemorySource, target: MemoryTarget) -> int:
    """One pass; how many pages went."""
    pages = 0
    for payload in payloads(source):
        index, offset, data = split(payload)
        assert index == 2
        target.put(offset, data)
        pages += len(data) // PAGE
    return pages


def test_memory_that_was_never_written_is_not_sent(bar: MemoryBar) -> None:
    assert list(MemorySource(bar).changed()) == []
    bar.write(0, bytes(RUN))
    assert payloads(MemorySource(bar)) == []


def test_a_client_that_makes_holes_while_pages_are_looked_for_holds_nobody_up(
    bar: MemoryBar, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar.write(0, b"x" * SIZE)
    seek = os.lseek
    monkeypatch.setattr(os, "lseek", lambda fd, at, how: at if how == os.SEEK_HOLE else seek(fd, at, how))
    assert len(payloads(MemorySource(bar))) == SIZE // RUN


def test_every_run_that_is_looked_at_is_told_of(bar: MemoryBar) -> None:
    source = MemorySource(bar)
    for offset in (0, 3 * RUN, 4 * RUN):
        bar.write(offset, b"x")
    assert [payload is None for payload in source.changed()] == [False] * 3
    bar.write(3 * RUN, b"y")
    assert [payload is None for payload in source.changed()] == [True, False, True]


def test_looking_for_pages_makes_none(bar: MemoryBar) -> None:
    bar.write(SIZE // 2, b"x")
    blocks = os.fstat(bar.fd).st_blocks
    list(MemorySource(bar).changed())
    assert os.fstat(bar.fd).st_blocks - blocks <= (RUN - PAGE) // 512


def test_what_was_sent_is_sent_again_only_if_it_changed(bar: MemoryBar, other: MemoryBar) -> None:
    source, target = MemorySource(bar), MemoryTarget(other)
    bar.write(PAGE - 1, b"ab")
    bar.write(SIZE - 1, b"z")
    assert move(source, target) == 3
    assert move(source, target) == 0
    bar.write(PAGE, b"c")
    assert move(source, target) == 1
    assert other.read(0, SIZE) == bytes(SIZE)
    target.apply()
    assert other.read(0, SIZE) == bar.read(0, SIZE)
    target.close()


def test_memory_that_was_cleared_since_arrives_as_zeros(bar: MemoryBar, other: MemoryBar) -> None:
    source, target = MemorySource(bar), MemoryTarget(other)
    bar.write(0, b"x" * SIZE)
    assert move(source, target) == SIZE // PAGE
    bar.clear()
    assert move(source, target) == SIZE // PAGE
    target.apply()
    assert other.read(0, SIZE) == bytes(SIZE)
    target.close()


def test_what_the_target_had_is_gone(bar: MemoryBar, other: MemoryBar) -> None:
    other.write(5 * PAGE, b"old")
    target = MemoryTarget(other)
    assert other.read(5 * PAGE, 3) == b"old"
    target.apply()
    assert other.read(0, SIZE) == bytes(SIZE)
    target.close()


def test_pages_side_by_side_travel_together_up_to_a_run(bar: MemoryBar) -> None:
    bar.write(0, b"x" * (2 * RUN))
    assert [split(payload)[1:] for payload in payloads(MemorySource(bar))] == [
        (0, b"x" * RUN),
        (RUN, b"x" * RUN),
    ]


@pytest.mark.parametrize(
    ("offset", "size"),
    [(1, PAGE), (0, 0), (0, PAGE - 1), (SIZE, PAGE), (SIZE - PAGE, 2 * PAGE), (1 << 63, PAGE)],
)
def test_what_are_no_pages_of_the_memory_is_refused(other: MemoryBar, offset: int, size: int) -> None:
    target = MemoryTarget(other)
    with pytest.raises(DeviceError) as refusal:
        target.put(offset, bytes(size))
    assert refusal.value.errno == errno.EINVAL
    target.close()


def test_a_payload_without_its_place_is_refused() -> None:
    assert split(struct.pack("<QQ", 2, PAGE)) == (2, PAGE, b"")
    with pytest.raises(DeviceError):
        split(bytes(15))


@pytest.mark.parametrize(("size", "backing"), [(0x100, PAGE), (SIZE, 3 * PAGE)])
def test_of_a_bar_all_that_is_there_travels_whatever_its_size(size: int, backing: int) -> None:
    bar, other = MemoryBar(2, size, backing=backing), MemoryBar(2, size, backing=backing)
    bar.store(backing - 1, b"x")
    source, target = MemorySource(bar), MemoryTarget(other)
    assert move(source, target) == 1
    with pytest.raises(DeviceError):
        target.put(backing, bytes(PAGE))
    target.apply()
    assert other.load(0, backing) == bar.load(0, backing)
    target.close()
    bar.close()
    other.close()


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(0, 3), st.booleans()), max_size=40))
def test_whatever_is_written_between_passes_arrives(writes: list[tuple[int, int, bool]]) -> None:
    bar, other = MemoryBar(2, 64 * PAGE), MemoryBar(2, 64 * PAGE)
    source, target = MemorySource(bar), MemoryTarget(other)
    for page, value, look in writes:
        bar.write(page * PAGE, bytes([value]))
        if look:
            move(source, target)
    move(source, target)
    assert move(source, target) == 0
    target.apply()
    assert other.read(0, bar.size) == bar.read(0, bar.size)
    target.close()
    bar.close()
    other.close()
