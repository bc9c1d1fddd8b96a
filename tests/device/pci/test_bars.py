"""BARs of registers."""

import errno
import logging
from contextlib import AbstractContextManager
from types import TracebackType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.pci.bars import UNMODELLED_OFFSETS, Bar, BarKind

SIZE = 256


class Recorder:
    """A sub-range that is plain memory and writes down how it was accessed."""

    def __init__(self, size: int) -> None:
        self.memory = bytearray(range(size))
        self.accesses: list[tuple[str, int, int]] = []

    def read(self, offset: int, count: int) -> int:
        self.accesses.append(("read", offset, count))
        return int.from_bytes(self.memory[offset : offset + count], "little")

    def write(self, offset: int, count: int, value: int) -> None:
        self.accesses.append(("write", offset, count))
        self.memory[offset : offset + count] = value.to_bytes(count, "little")


class Turnstile(AbstractContextManager["Turnstile"]):
    """Counts how often it is entered, and how deep we are."""

    def __init__(self) -> None:
        self.entered = 0
        self.depth = 0

    def __enter__(self) -> "Turnstile":
        self.entered += 1
        self.depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.depth -= 1


def a_bar() -> tuple[Bar, Recorder, Recorder]:
    """Registers at 0x00 to 0x3f and at 0x80 to 0xbf, nothing elsewhere."""
    bar = Bar(0, SIZE)
    low, high = Recorder(0x40), Recorder(0x40)
    bar.claim(0x00, 0x40, low, name="low")
    bar.claim(0x80, 0x40, high, name="high")
    return bar, low, high


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_natural_access_reaches_its_handler_as_it_is(count: int) -> None:
    bar, _, high = a_bar()
    assert bar.read(0x88, count) == bytes(range(8, 8 + count))
    bar.write(0x90, b"\xee" * count)
    assert high.accesses == [("read", 8, count), ("write", 16, count)]
    assert high.memory[16 : 16 + count] == b"\xee" * count


def test_an_odd_access_is_cut_into_natural_pieces_in_ascending_order() -> None:
    bar, low, _ = a_bar()
    assert bar.read(3, 15) == bytes(range(3, 18))
    assert low.accesses == [("read", 3, 1), ("read", 4, 4), ("read", 8, 8), ("read", 16, 2)]


def test_an_access_over_a_border_reaches_both_sides() -> None:
    bar, low, high = a_bar()
    assert bar.read(0x3C, 0x48) == bytes(range(0x3C, 0x40)) + bytes(0x40) + bytes(range(4))
    assert low.accesses == [("read", 0x3C, 4)]
    assert high.accesses == [("read", 0, 4)]


@given(st.integers(0, SIZE), st.integers(0, SIZE))
def test_reads_of_any_size_and_alignment_give_the_bytes_that_are_there(offset: int, count: int) -> None:
    bar, low, high = a_bar()
    count = min(count, SIZE - offset)
    everything = bytes(low.memory) + bytes(0x40) + bytes(high.memory) + bytes(0x40)
    assert bar.read(offset, count) == everything[offset : offset + count]


@given(st.integers(0, SIZE), st.binary(max_size=SIZE))
def test_writes_of_any_size_and_alignment_change_the_claimed_bytes_alone(offset: int, data: bytes) -> None:
    bar, low, high = a_bar()
    data = data[: SIZE - offset]
    model = bytearray(bytes(low.memory) + bytes(0x40) + bytes(high.memory) + bytes(0x40))
    model[offset : offset + len(data)] = data
    bar.write(offset, memoryview(data))
    assert bytes(low.memory) == bytes(model[0x00:0x40])
    assert bytes(high.memory) == bytes(model[0x80:0xC0])
    assert bar.read(0x40, 0x40) == bytes(0x40)


@given(st.integers(0, SIZE), st.integers(1, SIZE))
def test_handlers_see_natural_accesses_only(offset: int, count: int) -> None:
    bar, low, high = a_bar()
    bar.read(offset, min(count, SIZE - offset))
    for handler in (low, high):
        for _, at, size in handler.accesses:
            assert size in (1, 2, 4, 8)
            assert at % size == 0
            assert at + size <= 0x40


@pytest.mark.parametrize(
    ("offset", "count"), [(-1, 1), (-4, 4), (SIZE, 1), (SIZE - 3, 4), (0, SIZE + 1), (1 << 63, 4), (0, -1)]
)
def test_a_read_outside_is_refused_with_einval(offset: int, count: int) -> None:
    bar, low, high = a_bar()
    with pytest.raises(DeviceError) as refusal:
        bar.read(offset, count)
    assert refusal.value.errno == errno.EINVAL
    assert low.accesses == high.accesses == []


@pytest.mark.parametrize(
    ("offset", "count"), [(-1, 1), (-4, 4), (SIZE, 1), (SIZE - 3, 4), (0, SIZE + 1), (1 << 63, 4)]
)
def test_a_write_outside_is_refused_with_einval(offset: int, count: int) -> None:
    bar, low, high = a_bar()
    with pytest.raises(DeviceError) as refusal:
        bar.write(offset, bytes(count))
    assert refusal.value.errno == errno.EINVAL
    assert low.accesses == high.accesses == []


def test_an_empty_access_at_the_end_is_fine() -> None:
    bar, _, _ = a_bar()
    assert bar.read(SIZE, 0) == b""
    bar.write(SIZE, b"")


def test_what_nobody_claims_is_counted_by_offset_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    bar, _, _ = a_bar()
    with caplog.at_level(logging.WARNING):
        assert bar.read(0x44, 4) == bytes(4)
        assert bar.read(0x44, 4) == bytes(4)
        bar.write(0xC0, b"\xff\xff")
    assert dict(bar.unmodelled) == {0x44: 2, 0xC0: 1}
    assert [record.getMessage() for record in caplog.records] == [
        "BAR 0: read of 4 bytes at 0x44, where there is nothing",
        "BAR 0: write of 2 bytes at 0xc0, where there is nothing",
    ]


def test_a_sweep_over_the_bar_cannot_fill_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    bar = Bar(0, 0x10000)
    for offset in range(0, 0x10000, 4):
        bar.read(offset, 4)
    assert len(bar.unmodelled) == UNMODELLED_OFFSETS
    assert len(caplog.records) == UNMODELLED_OFFSETS


def test_one_large_access_to_nothing_counts_once() -> None:
    bar = Bar(0, 1 << 20)
    assert bar.read(0, 1 << 20) == bytes(1 << 20)
    assert dict(bar.unmodelled) == {0: 1}


def test_handlers_run_inside_the_gate_unless_they_are_claimed_ungated() -> None:
    gate = Turnstile()
    depths: list[int] = []

    class Look:
        def read(self, offset: int, count: int) -> int:
            depths.append(gate.depth)
            return 0

        def write(self, offset: int, count: int, value: int) -> None:
            depths.append(gate.depth)

    bar = Bar(0, 64)
    bar.gate = gate
    bar.claim(0, 16, Look())
    bar.claim(16, 16, Look(), gated=False)
    bar.read(0, 4)
    bar.write(0, bytes(4))
    bar.read(0, 16)
    bar.write(16, bytes(2))
    bar.read(16, 2)
    assert depths == [1, 1, 1, 1, 0, 0]
    assert gate.depth == 0


@pytest.mark.parametrize(
    ("offset", "size"), [(0x20, 0x40), (0x3C, 4), (0x7C, 8), (0xC0, 0x44), (2, 2), (-4, 4), (0x44, 0)]
)
def test_a_claim_must_fit_beside_the_others(offset: int, size: int) -> None:
    bar, _, _ = a_bar()
    with pytest.raises(ValueError, match="BAR 0"):
        bar.claim(offset, size, Recorder(size))


@pytest.mark.parametrize(
    ("index", "size", "kind"),
    [
        (0, 0, BarKind.MEM32),
        (0, 8, BarKind.MEM32),
        (0, 24, BarKind.MEM32),
        (0, 1 << 32, BarKind.MEM32),
        (0, 1 << 64, BarKind.MEM64),
        (5, 4096, BarKind.MEM64),
        (6, 4096, BarKind.MEM32),
        (-1, 4096, BarKind.MEM32),
    ],
)
def test_a_bar_that_pci_cannot_have_is_refused(index: int, size: int, kind: BarKind) -> None:
    with pytest.raises(ValueError, match="BAR"):
        Bar(index, size, kind=kind)
