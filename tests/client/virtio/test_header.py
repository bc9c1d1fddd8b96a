from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.errors import ClientError
from client.virtio.header import Gso, HeaderFlags, NetHeader


def test_a_header_is_the_bytes_that_the_spec_tells() -> None:
    header = NetHeader(HeaderFlags.NEEDS_CSUM, Gso.TCPV4 | Gso.ECN, 54, 1448, 34, 16, 2)
    assert header.encode() == bytes.fromhex("01 81 3600 a805 2200 1000 0200")


@given(st.binary(min_size=12, max_size=20))
def test_any_twelve_bytes_are_a_header(data: bytes) -> None:
    assert NetHeader.decode(data).encode() == data[:12]


def test_fewer_are_not() -> None:
    with pytest.raises(ClientError):
        NetHeader.decode(bytes(11))
