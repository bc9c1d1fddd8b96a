from __future__ import annotations

import contextlib
import struct
from errno import EINVAL

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import BadReply, Command, LocalProtocolError, RemoteProtocolError, Reply, Request
from protocol.dma_buf import pack_dma_buf, parse_dma_buf
from protocol.features import check_feature, check_feature_reply
from protocol.limits import MAX_DMA_BUF_RANGES, SMALL_REPLY
from protocol.messages import DeviceFeature, DmaBuf, DmaBufRange
from protocol.vfio import Feature, FeatureFlags
from tests.protocol.wire import ready_client, ready_server

GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
PAGE = 4096
ONE = pack_dma_buf(2, [(0, PAGE)])

numbers = st.integers(0, 2**64 - 1)


def head(nr_ranges: int, flags: int = 0) -> bytes:
    return struct.pack("=IIII", 2, 0, flags, nr_ranges)


def ask(method: int, data: bytes, argsz: int = 1 << 16) -> str | None:
    return check_feature(DeviceFeature(argsz, FeatureFlags(method | Feature.DMA_BUF)), data, 1 << 20)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=20),
)
def test_what_is_exported_comes_back(index: int, open_flags: int, spans: list[tuple[int, int]]) -> None:
    parsed, ranges = parse_dma_buf(pack_dma_buf(index, spans, open_flags))
    assert parsed == DmaBuf(index, open_flags, 0, len(spans))
    assert ranges == tuple(DmaBufRange(*span) for span in spans)


def test_as_many_ranges_as_fit_into_a_small_reply_and_not_one_more() -> None:
    spans = [(at * PAGE, PAGE) for at in range(MAX_DMA_BUF_RANGES + 1)]
    most = pack_dma_buf(2, spans[:-1])
    assert len(parse_dma_buf(most)[1]) == MAX_DMA_BUF_RANGES
    assert DeviceFeature.size + len(most) <= SMALL_REPLY < DeviceFeature.size + len(most) + DmaBufRange.size
    with pytest.raises(ValueError, match="255 ranges"):
        pack_dma_buf(2, spans)
    with pytest.raises(RemoteProtocolError, match="255 ranges"):
        parse_dma_buf(head(255) + bytes(16 * 255))


@pytest.mark.parametrize(
    "spans", [[], [(-1, PAGE)], [(0, 1 << 64)], [(1 << 64, PAGE)]], ids=["none", "before", "long", "far"]
)
def test_what_no_message_can_say_is_not_packed(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  (two sentences, of the limit and of the field)
        pack_dma_buf(2, spans)


MALFORMED = {
    "nothing": b"",
    "a cut head": head(1)[:-1],
    "flags": head(1, flags=1) + bytes(16),
    "no ranges": head(0),
    "no ranges that are there": head(0) + bytes(16),
    "a range that is not there": head(1),
    "half a range": head(1) + bytes(15),
    "one range too many": head(1) + bytes(32),
    "more ranges than the message": head(3) + bytes(32),
    "all the ranges there are": head(2**32 - 1) + bytes(16),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_export_is_refused_and_the_session_goes_on(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_dma_buf(data)
    assert (refusal.value.errno, refusal.value.fatal) == (EINVAL, False)
    assert ask(GET, data) is not None


@given(st.binary(max_size=80))
def test_any_bytes_are_an_export_or_refused(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_dma_buf(data)


def test_the_answer_to_an_export_must_have_room() -> None:
    assert ask(GET, ONE, 8 + len(ONE)) is None
    assert ask(GET, ONE, 8 + len(ONE) - 1) is not None
    assert ask(PROBE | GET, b"", 8) is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        ONE[:-1],
        ONE + bytes(1),
        pack_dma_buf(1, [(0, PAGE)]),
        pack_dma_buf(2, [(0, 2 * PAGE)]),
        pack_dma_buf(2, [(PAGE, PAGE)]),
        pack_dma_buf(2, [(0, PAGE), (PAGE, PAGE)]),
        pack_dma_buf(2, [(0, PAGE)], 1),
    ],
)
def test_an_answer_for_another_part_of_a_bar_makes_no_sense(data: bytes) -> None:
    asked = DeviceFeature(64, FeatureFlags(GET | Feature.DMA_BUF))
    assert check_feature_reply(asked, ONE, asked, ONE) is None
    assert check_feature_reply(asked, ONE, asked, data) is not None


# --- descriptors in the answer


def question(flags: int, data: bytes) -> tuple[DeviceFeature, Request]:
    """A request about a feature as it reaches a server."""
    body = DeviceFeature(64, FeatureFlags(flags))
    _, message = ready_client().request(Command.DEVICE_FEATURE, body, data)
    (asked,) = ready_server().receive(message)
    assert isinstance(asked, Request)
    return body, asked


def answered(data: bytes) -> object:
    """What a client makes of this answer, with descriptor 7, to its question for `ONE`."""
    ours, theirs = ready_client(), ready_server()
    body = DeviceFeature(64, FeatureFlags(GET | Feature.DMA_BUF))
    _, message = ours.request(Command.DEVICE_FEATURE, body, ONE)
    (asked,) = theirs.receive(message)
    assert isinstance(asked, Request)
    (got,) = ours.receive(theirs.reply(asked, body, data, fds=(5,)), (7,))
    return got


def test_the_answer_to_an_export_carries_a_descriptor() -> None:
    got = answered(ONE)
    assert isinstance(got, Reply)
    assert (got.data, got.fds) == (ONE, (7,))


@pytest.mark.parametrize("flags", [SET | 2, GET | 1, PROBE | GET | Feature.DMA_BUF])
def test_no_other_answer_about_features_carries_one(flags: int) -> None:
    body, asked = question(flags, bytes(8))
    with pytest.raises(LocalProtocolError, match="descriptors"):
        ready_server().reply(asked, body, bytes(8), fds=(5,))


def test_an_answer_cut_short_is_reported_with_its_descriptors() -> None:
    got = answered(ONE[:16])
    assert isinstance(got, BadReply)
    assert got.fds == (7,)
