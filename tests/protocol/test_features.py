from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import RemoteProtocolError
from protocol.features import bitmap_size, check_feature, pack_logging_start, parse_logging_start
from protocol.limits import MAX_LOGGED_RANGES
from protocol.messages import (
    DeviceFeature,
    DmaLoggingControl,
    DmaLoggingRange,
    DmaLoggingReport,
)
from protocol.vfio import Feature, FeatureFlags

GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
MOST = 1 << 20


def report(iova: int = 0, length: int = 1 << 20, page_size: int = 4096) -> bytes:
    return DmaLoggingReport(iova, length, page_size).encode()


def ask(flags: int, data: bytes = b"", argsz: int = 1 << 16) -> str | None:
    return check_feature(DeviceFeature(argsz, FeatureFlags(flags)), data, MOST)


@pytest.mark.parametrize(
    ("length", "page_size", "size"),
    [
        (1, 4096, 8),
        (4096 * 64, 4096, 8),
        (4096 * 64 + 1, 4096, 16),
        (1 << 30, 4096, 32768),
        (4096, 1, 512),
        (4096, 1 << 21, 8),
    ],
)
def test_a_bitmap_has_a_bit_for_each_page_in_whole_words(length: int, page_size: int, size: int) -> None:
    assert bitmap_size(length, page_size) == size


@given(st.integers(1, 2**64), st.integers(0, 40))
def test_a_bitmap_covers_every_page_and_wastes_less_than_a_word(length: int, order: int) -> None:
    pages = (length + (1 << order) - 1) >> order
    assert 0 <= bitmap_size(length, 1 << order) * 8 - pages < 64


spans = st.tuples(st.integers(0, 2**63), st.integers(1, 2**63))


@given(st.integers(0, 2**64 - 1), st.lists(spans, max_size=10))
def test_ranges_to_log_come_back(page_size: int, wanted: list[tuple[int, int]]) -> None:
    control, ranges = parse_logging_start(pack_logging_start(page_size, wanted))
    assert control == DmaLoggingControl(page_size, len(wanted))
    assert ranges == tuple(DmaLoggingRange(*span) for span in wanted)


def test_as_many_ranges_as_the_kernel_takes_and_not_one_more() -> None:
    spans = [(at << 12, 4096) for at in range(MAX_LOGGED_RANGES + 1)]
    assert len(parse_logging_start(pack_logging_start(4096, spans[:-1]))[1]) == MAX_LOGGED_RANGES
    with pytest.raises(ValueError, match="257 ranges"):
        pack_logging_start(4096, spans)
    hostile = DmaLoggingControl(4096, len(spans)).encode() + bytes(16 * len(spans))
    with pytest.raises(RemoteProtocolError, match="257 ranges"):
        parse_logging_start(hostile)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(15),
        DmaLoggingControl(4096, 1).encode(),
        DmaLoggingControl(4096, 1).encode() + bytes(15),
        DmaLoggingControl(4096, 0).encode() + bytes(16),
        DmaLoggingControl(4096, 2**32 - 1).encode() + bytes(16),
        DmaLoggingControl(4096, 1).encode() + DmaLoggingRange(4096, 0).encode(),
        DmaLoggingControl(4096, 1).encode() + DmaLoggingRange(4096, 2**64 - 1).encode(),
    ],
)
def test_malformed_ranges_are_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_logging_start(data)
    assert not refusal.value.fatal
    assert ask(SET | Feature.DMA_LOGGING_START, data) is not None


@given(st.binary(max_size=80))
def test_any_bytes_are_ranges_or_refused(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_logging_start(data)


@pytest.mark.parametrize("method", [GET, SET, PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET])
def test_one_method_or_a_probe_of_any_is_sound(method: int) -> None:
    assert ask(method | 99) is None


@pytest.mark.parametrize("flags", [0, 99, GET | SET, GET | 1 << 19, PROBE | 1 << 31])
def test_no_method_both_methods_and_unknown_ones_are_malformed(flags: int) -> None:
    assert ask(flags) is not None


@pytest.mark.parametrize(
    ("flags", "data", "needed"),
    [
        (GET | Feature.MIGRATION, b"", 16),
        (GET | Feature.MIG_DEVICE_STATE, b"", 16),
        (GET | Feature.DMA_LOGGING_REPORT, report(), 8 + 24 + 32),
        (SET | Feature.MIG_DEVICE_STATE, bytes(8), 16),
        (SET | Feature.DMA_LOGGING_START, DmaLoggingControl(4096, 0).encode(), 24),
        (SET | Feature.DMA_LOGGING_STOP, b"", 8),
        (PROBE | Feature.MIGRATION, b"", 8),
    ],
)
def test_the_answer_must_have_room(flags: int, data: bytes, needed: int) -> None:
    assert ask(flags, data, needed) is None
    assert ask(flags, data, needed - 1) is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        report()[:-1],
        report(page_size=0),
        report(page_size=4095),
        report(length=0),
        report(iova=4096, length=2**64 - 1),
        report(length=(MOST * 8 + 1) * 4096),
        report(length=2**64 - 1, page_size=1),
    ],
)
def test_a_report_that_cannot_be_given_is_malformed(data: bytes) -> None:
    assert ask(GET | Feature.DMA_LOGGING_REPORT, data, 2**32 - 1) is not None


def test_the_largest_report_is_given() -> None:
    assert ask(GET | Feature.DMA_LOGGING_REPORT, report(length=MOST * 8 * 4096), 2**32 - 1) is None


def test_a_state_cut_short_is_malformed() -> None:
    assert ask(SET | Feature.MIG_DEVICE_STATE, bytes(7)) is not None
