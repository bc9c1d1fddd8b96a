"""Known peers and their own ways: how they are told apart, and what goes over the wire because of them."""

from __future__ import annotations

import struct
from errno import EINVAL, EIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import (
    Broken,
    Command,
    Connection,
    ErrorReply,
    LocalProtocolError,
    Overrides,
    Quirk,
    Refused,
    Reply,
    Request,
    Role,
    Stray,
)
from protocol.capabilities import Capabilities, offer, parse_capabilities
from protocol.limits import MAX_WHOLE_MESSAGE, SMALL_REPLY, Limits
from protocol.messages import DmaAccess, DmaUnmap, RegionAccess, RegionInfo, Version
from protocol.quirks import ALSO, QUIRKS, Peer, detect, recognise
from protocol.vfio import DmaUnmapFlags
from tests.protocol import wire
from tests.protocol.wire import message, read_request, ready_client, ready_server, write_request

QEMU = (
    b'{"capabilities": {"max_dma_maps": 65535, "max_data_xfer_size": 1048576, "pgsizes": 4096, '
    b'"max_msg_fds": 16, "migration": {"pgsize": 4096, "max_bitmap_size": 268435456}, '
    b'"write_multiple": true}}\0'
)
RUST_VMM = b'{"capabilities":{"max_msg_fds":1,"max_data_xfer_size":1048576,"migration":{"pgsize":4096}}}\0'
LIBVFIO_USER = b'{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576 } }\0'
LIBVFIO_USER_TWIN = (
    b'{ "capabilities": { "max_msg_fds": 8, "max_data_xfer_size": 1048576, "migration": { "pgsize": 4096 }, '
    b'"twin_socket": { "supported": true, "fd_index": 0 } } }\0'
)


def forced(*quirks: Quirk) -> Overrides:
    return Overrides(force=frozenset(quirks))


# telling peers apart


@pytest.mark.parametrize(
    ("role", "said", "minor", "who"),
    [
        (Role.SERVER, QEMU, 0, Peer.QEMU_CLIENT),
        (Role.SERVER, b"", 1, Peer.SPDK_CLIENT),
        (Role.SERVER, RUST_VMM, 1, Peer.RUST_VMM_CLIENT),
        (Role.SERVER, b"", 0, None),
        (Role.SERVER, LIBVFIO_USER, 1, None),
        (Role.SERVER, offer(Limits()), 2, None),
        (Role.CLIENT, RUST_VMM, 0, Peer.RUST_VMM_SERVER),
        (Role.CLIENT, LIBVFIO_USER, 1, Peer.LIBVFIO_USER_SERVER),
        (Role.CLIENT, LIBVFIO_USER_TWIN, 2, Peer.LIBVFIO_USER_SERVER),
        (Role.CLIENT, QEMU, 0, None),
        (Role.CLIENT, b"", 0, None),
        (Role.CLIENT, b'{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576}}\0', 2, None),
    ],
)
def test_a_peer_is_known_by_what_it_announces(role: Role, said: bytes, minor: int, who: Peer | None) -> None:
    capabilities = parse_capabilities(said)
    assert recognise(role, capabilities, Version(0, minor)) is who
    assert bool(detect(role, capabilities, Version(0, minor))) == (who is not None)


def test_every_quirk_is_told_and_every_peer_has_one() -> None:
    assert set(QUIRKS) == set(Quirk)
    assert {about.peer for about in QUIRKS.values()} >= set(Peer)
    assert all(about.does and about.ours for about in QUIRKS.values())
    assert set(ALSO) <= set(Peer)


def test_a_known_peer_has_the_quirks_that_are_told_under_its_name() -> None:
    server = ready_server(QEMU)
    assert server.quirks >= {Quirk.SHIFTED_DMA, Quirk.BARE_DMA_WRITE_REPLY, Quirk.EOI_BY_ACCESS}
    assert Quirk.PADDED_ERRORS not in server.quirks
    assert ready_server().quirks == frozenset()


def test_quirks_are_switched_on_and_off_by_hand() -> None:
    fixed = ready_server(QEMU, quirks=Overrides(never=frozenset({Quirk.SHIFTED_DMA})))
    assert Quirk.SHIFTED_DMA not in fixed.quirks
    assert Quirk.BARE_DMA_WRITE_REPLY in fixed.quirks
    assert ready_server(quirks=forced(Quirk.SMALL_REPLIES)).quirks == {Quirk.SMALL_REPLIES}


@given(st.booleans(), st.frozensets(st.sampled_from(["pgsizes", "migration", "max_dma_maps"])))
def test_nobody_is_known_by_a_part_of_what_he_announces(server: bool, said: frozenset[str]) -> None:
    role = Role.SERVER if server else Role.CLIENT
    assert recognise(role, Capabilities(mentioned=said | {"max_msg_fds"}), Version(0, 0)) is None


# SHIFTED_DMA, BARE_DMA_WRITE_REPLY


def qemu_read_reply(message_id: int, address: int, data: bytes) -> bytes:
    """QEMU's answer to DMA_READ: data at 28 from the message's start, its length as if they were at 32."""
    payload = struct.pack("=QI", address, len(data)) + data + bytes(4)
    return message(message_id, wire.DMA_READ, payload, flags=wire.REPLY)


def test_data_for_qemu_lie_at_28_and_the_message_is_as_long_as_ever() -> None:
    server = ready_server(QEMU)
    message_id, sent = server.request(Command.DMA_WRITE, DmaAccess(0x1000, 6), b"abcdef")
    assert len(sent) == 32 + 6
    assert sent == message(message_id, wire.DMA_WRITE, struct.pack("=QI", 0x1000, 6) + b"abcdef" + bytes(4))
    (reply,) = server.receive(message(message_id, wire.DMA_WRITE, flags=wire.REPLY))
    assert reply == Reply(Command.DMA_WRITE, message_id, DmaAccess(0x1000, 6), b"")


@pytest.mark.parametrize(
    "data", [b"", b"x", b"abc", b"abcd", b"abcdefgh", bytes(7), bytes(5) + b"x", b"\0\0\0\1"]
)
def test_data_from_qemu_are_found(data: bytes) -> None:
    server = ready_server(QEMU)
    message_id, sent = server.request(Command.DMA_READ, DmaAccess(0x1000, len(data)))
    assert sent == message(message_id, wire.DMA_READ, struct.pack("=QQ", 0x1000, len(data)))
    (reply,) = server.receive(qemu_read_reply(message_id, 0x1000, data))
    assert reply == Reply(Command.DMA_READ, message_id, DmaAccess(0x1000, len(data)), data)
    assert Quirk.SHIFTED_DMA in server.quirks


def test_a_stranger_that_proves_to_shift_is_believed() -> None:
    server = ready_server()
    first, _ = server.request(Command.DMA_READ, DmaAccess(0x1000, 4))
    (reply,) = server.receive(qemu_read_reply(first, 0x1000, b"data"))
    assert reply == Reply(Command.DMA_READ, first, DmaAccess(0x1000, 4), b"data")
    _, sent = server.request(Command.DMA_WRITE, DmaAccess(0x1000, 4), b"back")
    assert sent[28:] == b"back" + bytes(4)


def test_a_qemu_that_proves_to_be_mended_is_believed() -> None:
    server = ready_server(QEMU)
    first, _ = server.request(Command.DMA_READ, DmaAccess(0x1000, 4))
    sound = message(first, wire.DMA_READ, struct.pack("=QQ", 0x1000, 4) + b"data", flags=wire.REPLY)
    (reply,) = server.receive(sound)
    assert reply == Reply(Command.DMA_READ, first, DmaAccess(0x1000, 4), b"data")
    _, sent = server.request(Command.DMA_WRITE, DmaAccess(0x1000, 4), b"back")
    assert sent[32:] == b"back"


def test_what_is_said_by_hand_outweighs_proof() -> None:
    server = ready_server(quirks=Overrides(never=frozenset({Quirk.SHIFTED_DMA})))
    message_id, _ = server.request(Command.DMA_READ, DmaAccess(0x1000, 4))
    (event,) = server.receive(qemu_read_reply(message_id, 0x1000, b"data"))
    assert not isinstance(event, Reply)
    assert Quirk.SHIFTED_DMA not in server.quirks


@given(st.lists(st.tuples(st.integers(0, 2**40), st.binary(max_size=40)), max_size=6), st.booleans())
def test_a_peer_with_either_form_is_read_alike(reads: list[tuple[int, bytes]], shifted: bool) -> None:
    """A client of ours that behaves like QEMU, or does not, and a server that was told."""
    quirks = forced(Quirk.SHIFTED_DMA, Quirk.BARE_DMA_WRITE_REPLY) if shifted else None
    client, server = ready_client(quirks=quirks), ready_server(quirks=quirks)
    for address, data in reads:
        _, sent = server.request(Command.DMA_READ, DmaAccess(address, len(data)))
        (asked,) = client.receive(sent)
        assert isinstance(asked, Request)
        (got,) = server.receive(client.reply(asked, asked.body, data))
        assert isinstance(got, Reply)
        assert got.data == data
        _, sent = server.request(Command.DMA_WRITE, DmaAccess(address, len(data)), data)
        (asked,) = client.receive(sent)
        assert isinstance(asked, Request)
        assert asked.data == data
        answer = client.reply(asked, asked.body)
        assert len(answer) == (16 if shifted else 32)
        (got,) = server.receive(answer)
        assert isinstance(got, Reply)


@given(st.binary(max_size=60))
def test_any_bytes_for_an_answer_of_qemu_are_read_or_refused(payload: bytes) -> None:
    server = ready_server(QEMU)
    message_id, _ = server.request(Command.DMA_READ, DmaAccess(0, 8))
    (event,) = server.receive(message(message_id, wire.DMA_READ, payload, flags=wire.REPLY))
    assert server.ready
    assert not isinstance(event, Reply) or len(event.data) <= 8


@given(st.binary(max_size=60))
def test_any_bytes_in_qemus_form_of_a_write_are_read_or_refused(payload: bytes) -> None:
    client = ready_client(quirks=forced(Quirk.SHIFTED_DMA))
    (event,) = client.receive(message(1, wire.DMA_WRITE, payload))
    assert isinstance(event, Request | Refused)


# PADDED_ERRORS


@pytest.mark.parametrize(
    ("command", "payload", "padding"),
    [
        (wire.DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0, 4096), b""),
        (wire.DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0, 4096), bytes(24)),
        (wire.GET_INFO, struct.pack("=IIII", 32, 0, 0, 0), bytes(16)),
        (wire.REGION_INFO, struct.pack("=IIIIQQ", 32, 0, 0, 0, 0, 0), bytes(32)),
        (wire.IRQ_INFO, struct.pack("=IIII", 16, 0, 0, 0), bytes(16)),
        (wire.REGION_READ, struct.pack("=QII", 0, 7, 4), bytes(16) + b"\xff\xff\xff\xff"),
        (wire.REGION_WRITE, struct.pack("=QII", 0, 7, 4) + b"abcd", bytes(16)),
        (wire.RESET, b"", b""),
    ],
)
def test_a_refusal_is_as_long_as_the_answer_that_rust_vmm_waits_for(
    command: int, payload: bytes, padding: bytes
) -> None:
    server = ready_server(RUST_VMM, minor=1)
    (request,) = server.receive(message(3, command, payload))
    assert isinstance(request, Request)
    refusal = message(3, command, padding, flags=wire.REPLY | wire.ERROR, error=EINVAL)
    assert server.error(request, EINVAL) == refusal


def test_a_read_that_the_engine_refuses_is_filled_up_too() -> None:
    server = ready_server(RUST_VMM, minor=1)
    (refused,) = server.receive(read_request(3, 7, 2**64 - 1, 4))
    assert isinstance(refused, Refused)
    assert server.error(refused, EINVAL)[16:] == bytes(16) + b"\xff" * 4


def test_nobody_can_have_a_refusal_longer_than_the_longest_answer() -> None:
    server = ready_server(RUST_VMM, minor=1)
    (refused,) = server.receive(read_request(3, 7, 0, 2**32 - 1))
    assert isinstance(refused, Refused)
    assert len(server.error(refused, EINVAL)) == 32 + (1 << 20)
    (unknown,) = server.receive(message(4, 0xFFFF, b"what"))
    assert isinstance(unknown, Refused)
    assert len(server.error(unknown, EINVAL)) == 16
    (short,) = server.receive(message(5, wire.REGION_READ, b"what"))
    assert isinstance(short, Refused)
    assert len(server.error(short, EINVAL)) == 32


# UNMAP_FLAGS_ONE_UP


def test_rust_vmms_unmapping_of_everything_is_understood_and_repeated() -> None:
    server = ready_server(RUST_VMM, minor=1)
    payload = struct.pack("=IIQQ", 24, 1 << 2, 0, 0)
    (request,) = server.receive(message(3, wire.DMA_UNMAP, payload))
    assert isinstance(request, Request)
    assert request.body == DmaUnmap(24, DmaUnmapFlags.ALL, 0, 0)
    assert server.reply(request, request.body) == message(3, wire.DMA_UNMAP, payload, flags=wire.REPLY)


def test_rust_vmms_server_is_told_in_its_own_flags() -> None:
    client = ready_client(RUST_VMM, minor=0)
    everything = DmaUnmap(24, DmaUnmapFlags.ALL, 0, 0)
    message_id, sent = client.request(Command.DMA_UNMAP, everything)
    payload = struct.pack("=IIQQ", 24, 1 << 2, 0, 0)
    assert sent == message(message_id, wire.DMA_UNMAP, payload)
    (reply,) = client.receive(message(message_id, wire.DMA_UNMAP, payload, flags=wire.REPLY))
    assert reply == Reply(Command.DMA_UNMAP, message_id, everything, b"")


def test_from_everybody_else_the_flag_is_unknown() -> None:
    (request,) = ready_server().receive(message(3, wire.DMA_UNMAP, struct.pack("=IIQQ", 24, 4, 0, 0)))
    assert isinstance(request, Request)
    assert isinstance(request.body, DmaUnmap)
    assert request.body.flags == 4


# ERRNO_ZERO, ANSWERED_POSTS, ERROR_COMMANDS, UNREAD_PAYLOADS


def test_a_refusal_with_errno_zero_is_eio() -> None:
    client = ready_client(RUST_VMM, minor=0)
    message_id, _ = client.request(Command.DEVICE_RESET)
    refusal = message(message_id, wire.RESET, flags=wire.REPLY | wire.ERROR)
    assert client.receive(refusal) == [ErrorReply(Command.DEVICE_RESET, message_id, EIO)]


@pytest.mark.parametrize("minor", [0, 1])
def test_a_refusal_of_the_type_command_is_a_refusal(minor: int) -> None:
    client = ready_client(RUST_VMM, minor=minor)
    message_id, _ = client.request(Command.REGION_READ, RegionAccess(0, 7, 4))
    refusal = message(message_id, wire.REGION_READ, flags=wire.ERROR, error=EINVAL)
    assert client.receive(refusal) == [ErrorReply(Command.REGION_READ, message_id, EINVAL)]
    assert client.outstanding == 0


def test_a_posted_write_that_is_refused_all_the_same_is_dropped() -> None:
    client = ready_client(RUST_VMM, minor=0)
    message_id, _ = client.request(Command.REGION_WRITE, RegionAccess(0, 7, 1), b"x", no_reply=True)
    refusal = message(message_id, wire.REGION_WRITE, flags=wire.ERROR)
    assert client.receive(refusal) == [Stray(Command.REGION_WRITE, message_id)]


@pytest.mark.parametrize(
    "sent",
    [
        message(9, wire.RESET, flags=wire.ERROR),
        message(0, wire.REGION_READ, bytes(16), flags=wire.ERROR),
        message(0, wire.REGION_READ),
    ],
)
def test_other_commands_with_the_error_flag_are_no_refusals(sent: bytes) -> None:
    client = ready_client()
    (event,) = client.receive(sent)
    assert isinstance(event, Refused)


def test_a_payload_taken_for_a_header_ends_the_session() -> None:
    client = ready_client(RUST_VMM, minor=0)
    message_id, _ = client.request(Command.DEVICE_RESET)
    nonsense = message(message_id, wire.RESET, flags=wire.REPLY | wire.ERROR)
    answer = message(0x1234, wire.REGION_READ, flags=wire.REPLY | wire.ERROR)
    assert isinstance(client.receive(nonsense + answer)[-1], Broken)


# SMALL_REPLIES


def test_spdk_is_not_answered_with_more_than_it_has_room_for() -> None:
    server = ready_server(b"", minor=1)
    (request,) = server.receive(message(0, wire.REGION_INFO, struct.pack("=IIIIQQ", 8192, 0, 0, 0, 0, 0)))
    assert isinstance(request, Request)
    assert request.body == RegionInfo(SMALL_REPLY)
    (read,) = server.receive(read_request(0, 2, 0, SMALL_REPLY))
    assert isinstance(read, Refused)
    (small,) = server.receive(read_request(0, 2, 0, 64))
    assert isinstance(small, Request)
    (write,) = server.receive(write_request(0, 2, 0, bytes(2 * SMALL_REPLY)))
    assert isinstance(write, Request)


# WHOLE_BODIES


def test_libvfio_user_is_sent_no_more_than_a_socket_hands_over_whole() -> None:
    client = ready_client(LIBVFIO_USER)
    assert client.max_read == 1 << 20
    data = bytes(client.max_write)
    _, sent = client.request(Command.REGION_WRITE, RegionAccess(0, 2, len(data)), data)
    assert len(sent) <= MAX_WHOLE_MESSAGE
    with pytest.raises(LocalProtocolError, match="max_data_xfer_size"):
        client.request(Command.REGION_WRITE, RegionAccess(0, 2, len(data) + 1), data + b"x")
    client.request(Command.REGION_READ, RegionAccess(0, 2, 1 << 20))
    assert ready_client().max_write == 65536


# a connection that has no say yet


def test_before_version_only_what_was_said_by_hand_is_believed() -> None:
    assert Connection(Role.SERVER).quirks == frozenset()
    assert Connection(Role.SERVER, quirks=forced(Quirk.SHIFTED_DMA)).quirks == {Quirk.SHIFTED_DMA}
