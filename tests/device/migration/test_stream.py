"""The stream's format: what is written is read, whatever else is refused."""

import errno
import struct
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.migration.stream import (
    END,
    MAGIC,
    MAX_IDENTITY,
    MAX_PAYLOAD,
    Section,
    StreamReader,
    StreamWriter,
    encode_identity,
)

IDENTITY = encode_identity({"id": "1af4:1041", "queues": "3 of 256"})
SIZES = {b"ONE\0": 64, b"TWO\0": 64}
LIMIT = 4096

sections = st.lists(st.tuples(st.sampled_from(sorted(SIZES)), st.binary(max_size=64)), max_size=8)


def written(parts: list[Section], identity: bytes = IDENTITY) -> bytes:
    writer = StreamWriter(identity)
    for tag, payload in parts:
        writer.section(tag, payload)
    writer.finish()
    return writer.take(writer.waiting)


def reader(limit: int = LIMIT) -> StreamReader:
    return StreamReader(IDENTITY, SIZES, limit)


def refused(data: bytes, taker: StreamReader | None = None) -> str | None:
    """Why `data` is refused; None if it is not."""
    try:
        (taker or reader()).feed(data)
    except DeviceError as error:
        assert error.errno == errno.EINVAL
        return str(error)
    return None


@given(sections, st.lists(st.integers(1, 400), max_size=20))
def test_what_is_written_is_read_in_pieces_of_any_size(parts: list[Section], cuts: list[int]) -> None:
    data = written(parts)
    taker = reader()
    got = []
    for cut in [*cuts, len(data)]:
        piece, data = data[:cut], data[cut:]
        got += taker.feed(piece)
    assert got == parts
    assert taker.complete


@given(sections, st.integers(1, 100))
def test_it_can_be_taken_in_pieces_of_any_size(parts: list[Section], size: int) -> None:
    writer = StreamWriter(IDENTITY)
    for tag, payload in parts:
        writer.section(tag, payload)
    writer.finish()
    taken = b""
    while piece := writer.take(size):
        taken += piece
    assert taken == written(parts)


def test_the_layout_is_that_of_the_picture() -> None:
    body = MAGIC + struct.pack("<HHI", 1, 0, len(IDENTITY)) + IDENTITY
    body += b"ONE\0" + struct.pack("<I", 3) + b"abc" + b"END\0" + struct.pack("<I", 16)
    assert written([(b"ONE\0", b"abc")]) == body + blake2b(body, digest_size=16).digest()


@given(sections, st.data())
def test_a_stream_with_any_byte_changed_is_refused(parts: list[Section], data: st.DataObject) -> None:
    stream = bytearray(written(parts))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at] ^= data.draw(st.integers(1, 255))
    taker = reader()
    assert refused(bytes(stream), taker) or not taker.complete


@given(sections, st.data())
def test_a_stream_that_ends_early_is_not_complete(parts: list[Section], data: st.DataObject) -> None:
    stream = written(parts)
    taker = reader()
    taker.feed(stream[: data.draw(st.integers(0, len(stream) - 1))])
    assert not taker.complete


@given(st.lists(st.binary(max_size=300), max_size=10), st.booleans())
def test_any_bytes_are_refused_or_waited_for(pieces: list[bytes], begin_well: bool) -> None:
    taker = reader()
    if begin_well:
        taker.feed(written([])[: -(8 + 16)])
    for piece in pieces:
        refused(piece, taker)
    assert not taker.complete


def test_bytes_after_the_end_are_refused() -> None:
    assert "after the end" in (refused(written([]) + b"\0") or "")
    taker = reader()
    taker.feed(written([]))
    assert "after the end" in (refused(b"\0", taker) or "")


# --- the first bytes


@pytest.mark.parametrize("length", range(1, 9))
def test_what_is_no_stream_of_ours_is_refused_at_its_first_wrong_byte(length: int) -> None:
    head = MAGIC[: length - 1] + bytes([MAGIC[length - 1] ^ 1])
    assert "none of a trionic card" in (refused(head) or "")
    assert refused(MAGIC[:length]) is None


@pytest.mark.parametrize(("version", "zero"), [(0, 0), (2, 0), (1, 1)])
def test_another_format_is_refused(version: int, zero: int) -> None:
    assert "format" in (refused(MAGIC + struct.pack("<HHI", version, zero, 10)) or "")


def test_the_card_that_differs_is_refused_with_the_last_byte_of_its_identity() -> None:
    theirs = encode_identity({"id": "1af4:1041", "queues": "9 of 256"})
    head = MAGIC + struct.pack("<HHI", 1, 0, len(theirs)) + theirs
    assert refused(head[:-1]) is None
    why = refused(head)
    assert why is not None
    assert "'queues=9 of 256'" in why
    assert "'queues=3 of 256'" in why


@pytest.mark.parametrize("theirs", [b"", IDENTITY[:-1], IDENTITY + b"more=1\n", b"\xff" * 40])
def test_an_identity_that_is_not_quite_ours_is_refused(theirs: bytes) -> None:
    assert "the cards differ" in (refused(MAGIC + struct.pack("<HHI", 1, 0, len(theirs)) + theirs) or "")


def test_an_identity_one_over_the_limit_is_refused_before_it_comes() -> None:
    assert refused(MAGIC + struct.pack("<HHI", 1, 0, MAX_IDENTITY)) is None
    assert "an identity of 4097 bytes" in (refused(MAGIC + struct.pack("<HHI", 1, 0, MAX_IDENTITY + 1)) or "")
    assert len(encode_identity({"a": "b" * (MAX_IDENTITY - 3)})) == MAX_IDENTITY
    with pytest.raises(ValueError, match="at most 4096 bytes"):
        encode_identity({"a": "b" * (MAX_IDENTITY - 2)})


def test_a_trait_of_two_lines_is_none() -> None:
    with pytest.raises(ValueError, match="one line"):
        encode_identity({"a": "b\nc=d"})


# --- sections


def test_a_section_one_over_its_size_is_refused_before_it_comes() -> None:
    start = written([])[: -(8 + 16)]
    assert refused(start + b"ONE\0" + struct.pack("<I", 64)) is None
    assert "of 65 bytes" in (refused(start + b"ONE\0" + struct.pack("<I", 65)) or "")
    assert "SIX" in (refused(start + b"SIX\0" + struct.pack("<I", 0)) or "")


def test_an_end_mark_without_its_whole_digest_is_refused() -> None:
    start = written([])[: -(8 + 16)] + END
    assert "another one" in (refused(start + struct.pack("<I", 8) + bytes(8)) or "")
    assert "of 17 bytes" in (refused(start + struct.pack("<I", 17)) or "")


def test_a_writer_refuses_what_no_reader_would_take() -> None:
    writer = StreamWriter(IDENTITY)
    writer.section(b"ONE\0", bytes(MAX_PAYLOAD))
    with pytest.raises(ValueError, match="of at most"):
        writer.section(b"ONE\0", bytes(MAX_PAYLOAD + 1))


def test_a_stream_one_over_the_limit_is_refused() -> None:
    stream = written([(b"ONE\0", bytes(64))] * 5)
    taker = reader(len(stream))
    assert len(taker.feed(stream)) == 5
    assert taker.complete
    assert "more bytes" in (refused(stream, reader(len(stream) - 1)) or "")


def test_who_refused_once_refuses_everything() -> None:
    taker = reader()
    first = refused(b"?", taker)
    assert first
    assert refused(written([]), taker) == first
    assert not taker.complete
