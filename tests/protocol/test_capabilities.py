from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import Limits, RemoteProtocolError
from protocol.capabilities import Capabilities, answer, offer, parse_capabilities
from protocol.limits import MAX_VERSION_DATA

QEMU = (
    b'{"capabilities": {"max_dma_maps": 65535, "max_data_xfer_size": 1048576, "pgsizes": 4096, '
    b'"max_msg_fds": 16, "migration": {"pgsize": 4096}, "write_multiple": true}}\0'
)


def said(data: bytes) -> dict[str, object]:
    assert data.endswith(b"}\0")
    document = json.loads(data[:-1])
    assert list(document) == ["capabilities"]
    capabilities = document["capabilities"]
    assert isinstance(capabilities, dict)
    return capabilities


def test_a_peer_that_says_nothing_has_the_defaults_of_the_spec() -> None:
    silent = parse_capabilities(b"")
    assert (silent.max_msg_fds, silent.max_data_xfer_size) == (1, 1048576)
    assert (silent.max_dma_maps, silent.pgsizes) == (65535, 4096)
    assert not silent.write_multiple
    assert not silent.twin_socket
    assert parse_capabilities(b"{}\0") == silent


def test_what_qemu_says_is_understood() -> None:
    qemu = parse_capabilities(QEMU)
    assert (qemu.max_msg_fds, qemu.write_multiple, qemu.migration_pgsize) == (16, True, 4096)
    assert {"pgsizes", "max_dma_maps", "write_multiple", "migration"} <= qemu.mentioned


def test_twin_socket_parameters_are_read() -> None:
    peer = parse_capabilities(b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}\0')
    assert peer.twin_socket
    assert peer.twin_socket_fd_index == 0


def test_unknown_keys_are_ignored() -> None:
    peer = parse_capabilities(b'{"capabilities":{"warp":9,"max_msg_fds":3},"vendor":[]}\0')
    assert peer.max_msg_fds == 3


@pytest.mark.parametrize(
    "wrong",
    [
        b"{}",
        b'{"a":1}\0{"b":2}\0',
        b"nonsense\0",
        b"\xff\xfe\0",
        b"[1]\0",
        b'{"capabilities":[]}\0',
        b'{"capabilities":{"max_msg_fds":"8"}}\0',
        b'{"capabilities":{"max_msg_fds":true}}\0',
        b'{"capabilities":{"max_msg_fds":-1}}\0',
        b'{"capabilities":{"max_msg_fds":1.5}}\0',
        b'{"capabilities":{"max_data_xfer_size":18446744073709551616}}\0',
        b'{"capabilities":{"write_multiple":1}}\0',
        b'{"capabilities":{"twin_socket":true}}\0',
        b'{"capabilities":{"migration":7}}\0',
        b"[" * 4000 + b"\0",
        b'{"capabilities":{}}\0' + b"\0" * MAX_VERSION_DATA,
    ],
)
def test_malformed_announcements_are_refused(wrong: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_capabilities(wrong)


def test_a_server_answers_only_with_what_was_proposed() -> None:
    assert said(answer(Limits(), Capabilities())) == {}
    low = Limits(max_msg_fds=0, max_data_xfer_size=4096)
    assert said(answer(low, Capabilities())) == {"max_msg_fds": 0, "max_data_xfer_size": 4096}, (
        "a client that reckons with the defaults would send too much"
    )
    answered = said(answer(Limits(), parse_capabilities(QEMU)))
    assert set(answered) == {
        *("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple")
    }
    assert answered["max_msg_fds"] == 16


def test_an_offer_is_understood_as_it_was_meant() -> None:
    peer = parse_capabilities(offer(Limits(max_msg_fds=4, max_data_xfer_size=4096)))
    assert (peer.max_msg_fds, peer.max_data_xfer_size) == (4, 4096)


@given(st.binary(max_size=200))
def test_any_bytes_are_either_understood_or_refused(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_capabilities(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("aé{", max_size=5),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text("aé{", max_size=5), children, max_size=3)
    ),
)


@given(
    st.dictionaries(
        st.sampled_from(["max_msg_fds", "max_data_xfer_size", "twin_socket", "migration", "write_multiple"]),
        json_values,
    )
)
def test_any_json_is_either_understood_or_refused(capabilities: dict[str, object]) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_capabilities(json.dumps({"capabilities": capabilities}).encode() + b"\0")
