from __future__ import annotations

import contextlib
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import RemoteProtocolError
from protocol.limits import MAX_WRITES_PER_MESSAGE
from protocol.messages import WriteMulti
from protocol.write_multi import pack_writes, parse_writes

ENTRY = "=QII8s"

writes = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 8), st.binary(min_size=1, max_size=8)),
    max_size=20,
)


@pytest.mark.skipif(sys.byteorder != "little", reason="the bytes below are a little-endian host's")
def test_writes_are_packed_as_the_spec_tells() -> None:
    packed = pack_writes([(4, 0x3000, b"\1\0"), (0, 0x14, b"12345678")])
    assert packed == bytes.fromhex(
        "0030000000000000 04000000 02000000 0100000000000000"
        "1400000000000000 00000000 08000000 3132333435363738"
    )


@given(writes)
def test_what_is_packed_is_parsed_in_order(wanted: list[tuple[int, int, bytes]]) -> None:
    assert parse_writes(WriteMulti(len(wanted)), pack_writes(wanted)) == tuple(wanted)


def test_as_many_as_a_message_may_have_are_taken() -> None:
    many = [(0, at, b"x") for at in range(MAX_WRITES_PER_MESSAGE)]
    assert parse_writes(WriteMulti(len(many)), pack_writes(many)) == tuple(many)


def test_one_more_than_a_message_may_have_is_not_packed_or_parsed() -> None:
    many = [(0, at, b"x") for at in range(MAX_WRITES_PER_MESSAGE + 1)]
    with pytest.raises(ValueError, match="201 writes"):
        pack_writes(many)
    with pytest.raises(RemoteProtocolError, match="201 writes"):
        parse_writes(WriteMulti(len(many)), struct.pack(ENTRY, 0, 0, 1, b"x") * len(many))


@pytest.mark.parametrize("data", [b"", b"123456789"])
def test_a_write_of_no_or_too_many_bytes_is_not_packed(data: bytes) -> None:
    with pytest.raises(ValueError, match="a write of"):
        pack_writes([(0, 0, data)])


@pytest.mark.parametrize(
    ("count", "data"),
    [
        (1, b""),
        (0, bytes(24)),
        (1, bytes(23)),
        (2, struct.pack(ENTRY, 0, 0, 1, b"x")),
        (2**64 - 1, bytes(24)),
        (1, struct.pack(ENTRY, 0, 0, 0, b"x")),
        (1, struct.pack(ENTRY, 0, 0, 9, b"x")),
        (1, struct.pack(ENTRY, 0, 0, 2**32 - 1, b"x")),
        (1, struct.pack(ENTRY, 2**64 - 1, 0, 2, b"x")),
    ],
)
def test_malformed_writes_are_refused(count: int, data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_writes(WriteMulti(count), data)
    assert not refusal.value.fatal


@given(st.integers(0, 300), st.binary(max_size=200))
def test_any_bytes_are_writes_or_refused(count: int, data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert len(parse_writes(WriteMulti(count), data)) == count
