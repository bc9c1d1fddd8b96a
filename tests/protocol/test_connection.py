"""Well-behaved dialogues, each side against bytes written by hand."""

from __future__ import annotations

import json
import struct

import pytest

from protocol import (
    Command,
    Connection,
    ErrorReply,
    LocalProtocolError,
    Negotiated,
    Refused,
    Reply,
    Request,
    Role,
    Stray,
)
from protocol.limits import MAX_OUTSTANDING
from protocol.messages import (
    DeviceInfo,
    DmaAccess,
    DmaMap,
    MigData,
    Record,
    RegionAccess,
    SetIrqs,
)
from protocol.vfio import (
    DmaMapFlags,
    IrqSetFlags,
)
from tests.protocol import wire
from tests.protocol.wire import message, proposal, read_request, ready_client, ready_server, write_request


def test_a_server_agrees_to_the_version_of_qemu() -> None:
    server = Connection(Role.SERVER)
    said = b'{"capabilities":{"max_msg_fds":16,"pgsizes":4096,"max_dma_maps":65535,"write_multiple":true}}\0'
    (event,) = server.receive(proposal(json=said, message_id=9))
    assert isinstance(event, Negotiated)
    assert (event.version.major, event.version.minor) == (0, 0)
    assert event.peer.max_msg_fds == 16
    message_id, command, size, flags, error, major, minor = struct.unpack_from("=HHIIIHH", event.reply)
    assert (message_id, command, size, flags, error) == (9, 1, len(event.reply), 1, 0)
    assert (major, minor) == (0, 0)
    announced = json.loads(event.reply[20:-1])["capabilities"]
    assert event.reply[-1] == 0
    assert announced["max_msg_fds"] <= 16
    assert server.ready


def test_a_client_proposes_itself_with_json_and_a_nul() -> None:
    client = Connection(Role.CLIENT)
    sent = client.propose()
    message_id, command, size, flags, error, major, _ = struct.unpack_from("=HHIIIHH", sent)
    assert (command, size, flags, error, major) == (1, len(sent), 0, 0, 0)
    assert json.loads(sent[20:-1])["capabilities"]["max_msg_fds"] == 16
    (event,) = client.receive(message(message_id, 1, struct.pack("=HH", 0, 0), flags=wire.REPLY))
    assert isinstance(event, Negotiated)
    assert event.reply == b""
    assert event.peer.max_msg_fds == 1
    assert client.ready


def test_a_posted_write_gets_no_answer_and_no_refusal() -> None:
    server = ready_server()
    (request,) = server.receive(write_request(1, 0, 0x3000, b"\0\0", flags=wire.NO_REPLY))
    assert isinstance(request, Request)
    assert request.no_reply
    assert server.reply(request, request.body) == b""
    assert server.error(request, 22) == b""


def test_a_refused_posted_request_gets_no_answer() -> None:
    server = ready_server()
    (refused,) = server.receive(message(1, wire.REGION_WRITE, b"short", flags=wire.NO_REPLY))
    assert isinstance(refused, Refused)
    assert server.error(refused, refused.errno) == b""


def test_a_posted_write_carries_the_flag_and_waits_for_nothing() -> None:
    client = ready_client()
    message_id, sent = client.request(
        Command.REGION_WRITE, RegionAccess(0x10, 2, 4), b"\1\2\3\4", no_reply=True
    )
    assert sent == write_request(message_id, 2, 0x10, b"\1\2\3\4", flags=wire.NO_REPLY)
    assert client.outstanding == 0


def test_a_reply_to_a_posted_write_is_dropped() -> None:
    client = ready_client()
    message_id, _ = client.request(Command.REGION_WRITE, RegionAccess(0, 2, 1), b"\1", no_reply=True)
    payload = struct.pack("=QII", 0, 2, 1)
    (event,) = client.receive(message(message_id, wire.REGION_WRITE, payload, flags=wire.REPLY))
    assert event == Stray(Command.REGION_WRITE, message_id)
    assert client.ready


def test_replies_may_come_in_any_order() -> None:
    client = ready_client()
    asked = [client.request(Command.REGION_READ, RegionAccess(at, 0, 1))[0] for at in range(3)]
    for at in (2, 0, 1):
        payload = struct.pack("=QII", at, 0, 1) + bytes([at])
        (reply,) = client.receive(message(asked[at], wire.REGION_READ, payload, flags=wire.REPLY))
        assert isinstance(reply, Reply)
        assert (reply.message_id, reply.data) == (asked[at], bytes([at]))


def test_a_server_asks_for_memory_and_is_refused_too() -> None:
    server = ready_server()
    with pytest.raises(LocalProtocolError, match="max_data_xfer_size"):
        server.request(Command.DMA_READ, DmaAccess(0, (1 << 20) + 1))
    with pytest.raises(LocalProtocolError, match="carries"):
        server.request(Command.DMA_WRITE, DmaAccess(0, 4), b"abc")
    with pytest.raises(LocalProtocolError, match="wraps"):
        server.request(Command.DMA_READ, DmaAccess(2**64 - 1, 2))
    assert server.outstanding == 0


@pytest.mark.parametrize("length", [0, 12, 16])
def test_a_write_to_memory_is_answered_in_any_of_three_lengths(length: int) -> None:
    server = ready_server()
    message_id, _ = server.request(Command.DMA_WRITE, DmaAccess(0x1000, 4), b"abcd")
    payload = struct.pack("=QQ", 0x1000, 4)[:length]
    (reply,) = server.receive(message(message_id, wire.DMA_WRITE, payload, flags=wire.REPLY))
    assert reply == Reply(Command.DMA_WRITE, message_id, DmaAccess(0x1000, 4), b"")


def test_migration_data_beyond_their_length_are_cut_off() -> None:
    client = ready_client()
    message_id, _ = client.request(Command.MIG_DATA_READ, MigData(24, 16))
    payload = struct.pack("=II", 13, 5) + b"state" + bytes(11)
    (reply,) = client.receive(message(message_id, wire.MIG_READ, payload, flags=wire.REPLY))
    assert reply == Reply(Command.MIG_DATA_READ, message_id, MigData(13, 5), b"state")


def test_equal_ids_of_different_commands_are_told_apart() -> None:
    client = ready_client()
    first, _ = client.request(Command.DEVICE_RESET)
    client._next_id = first
    second, _ = client.request(Command.REGION_READ, RegionAccess(0, 7, 1))
    assert first == second
    answer = message(second, wire.REGION_READ, struct.pack("=QII", 0, 7, 1) + b"x", flags=wire.REPLY)
    events = client.receive(answer + message(first, wire.RESET, flags=wire.REPLY))
    assert [type(event) for event in events] == [Reply, Reply]


def test_an_id_that_still_waits_is_not_given_again() -> None:
    client = ready_client()
    waiting, _ = client.request(Command.DEVICE_RESET)
    client._next_id = waiting
    again, _ = client.request(Command.DEVICE_RESET)
    assert again != waiting


def test_message_ids_wrap_at_16_bits() -> None:
    client = ready_client()
    client._next_id = 0xFFFF
    assert client.request(Command.DEVICE_RESET)[0] == 0xFFFF
    assert client.request(Command.DEVICE_RESET)[0] == 0


def test_a_shorter_read_is_the_servers_right() -> None:
    client = ready_client()
    message_id, _ = client.request(Command.REGION_READ, RegionAccess(0, 7, 8))
    payload = struct.pack("=QII", 0, 7, 3) + b"abc"
    (reply,) = client.receive(message(message_id, wire.REGION_READ, payload, flags=wire.REPLY))
    assert isinstance(reply, Reply)
    assert reply.data == b"abc"


def test_error_replies_with_a_payload_are_understood() -> None:
    client = ready_client()
    message_id, _ = client.request(Command.REGION_READ, RegionAccess(0, 7, 8))
    payload = struct.pack("=QII", 0, 7, 8) + bytes(8)
    refusal = message(message_id, wire.REGION_READ, payload, flags=wire.REPLY | wire.ERROR, error=22)
    assert client.receive(refusal) == [ErrorReply(Command.REGION_READ, message_id, 22)]


@pytest.mark.parametrize("errno", [0, 4096, 0xFFFF_FFFF])
def test_an_errno_that_linux_does_not_know_is_eio(errno: int) -> None:
    client = ready_client()
    message_id, _ = client.request(Command.DEVICE_RESET)
    refusal = message(message_id, wire.RESET, flags=wire.REPLY | wire.ERROR, error=errno)
    assert client.receive(refusal) == [ErrorReply(Command.DEVICE_RESET, message_id, 5)]


def test_extra_fields_of_a_newer_peer_are_skipped() -> None:
    server = ready_server()
    newer = struct.pack("=IIIIII", 24, 0, 0, 0, 0, 0)
    (request,) = server.receive(message(1, wire.GET_INFO, newer))
    assert isinstance(request, Request)
    assert request.body == DeviceInfo(24)


def test_an_argsz_that_counts_more_than_needed_is_accepted() -> None:
    server = ready_server()
    (request,) = server.receive(message(1, wire.GET_INFO, struct.pack("=IIII", 0xFFFF_FFFF, 0, 0, 0)))
    assert isinstance(request, Request)


def test_unmapping_everything_needs_no_range() -> None:
    server = ready_server()
    (request,) = server.receive(message(1, wire.DMA_UNMAP, struct.pack("=IIQQ", 24, 2, 0, 0)))
    assert isinstance(request, Request)


# what this side may not do


def test_nothing_but_version_can_be_asked_first() -> None:
    client = Connection(Role.CLIENT)
    with pytest.raises(LocalProtocolError):
        client.request(Command.DEVICE_RESET)
    client.propose()
    with pytest.raises(LocalProtocolError):
        client.request(Command.DEVICE_RESET)
    with pytest.raises(LocalProtocolError):
        client.propose()


def test_a_server_proposes_nothing_and_asks_for_nothing_that_a_client_asks() -> None:
    with pytest.raises(LocalProtocolError):
        Connection(Role.SERVER).propose()
    with pytest.raises(LocalProtocolError):
        ready_server().request(Command.REGION_READ, RegionAccess(0, 0, 4))


@pytest.mark.parametrize("command", [Command.DMA_READ, Command.DMA_WRITE, Command.VERSION])
def test_commands_that_are_not_ours_to_send_are_refused_here(command: Command) -> None:
    with pytest.raises(LocalProtocolError):
        ready_client().request(command)


@pytest.mark.parametrize(
    ("command", "body", "data", "fds"),
    [
        (Command.REGION_READ, None, b"", ()),
        (Command.REGION_READ, DeviceInfo(16), b"", ()),
        (Command.REGION_READ, RegionAccess(0, 0, 4), b"data", ()),
        (Command.REGION_READ, RegionAccess(0, 0, 65537), b"", ()),
        (Command.REGION_READ, RegionAccess(0, 0, 1 << 40), b"", ()),
        (Command.REGION_READ, RegionAccess(0, 0, 4), b"", (1,)),
        (Command.REGION_WRITE, RegionAccess(0, 0, 4), b"abc", ()),
        (Command.DEVICE_RESET, None, b"x", ()),
        (Command.DMA_MAP, DmaMap(32, DmaMapFlags.READ, 0, 0, 4096), b"", (1, 2)),
        (
            Command.DEVICE_SET_IRQS,
            SetIrqs(20, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, 2, 0, 9),
            b"",
            tuple(range(9)),
        ),
    ],
)
def test_what_the_peer_would_refuse_is_not_sent(
    command: Command, body: Record | None, data: bytes, fds: tuple[int, ...]
) -> None:
    client = ready_client()
    with pytest.raises(LocalProtocolError):
        client.request(command, body, data, fds)
    assert client.outstanding == 0
    client.request(Command.DEVICE_RESET)


def test_requests_without_an_answer_do_not_pile_up_for_ever() -> None:
    client = ready_client()
    for _ in range(MAX_OUTSTANDING):
        client.request(Command.DEVICE_RESET)
    with pytest.raises(LocalProtocolError, match="without an answer"):
        client.request(Command.DEVICE_RESET)
    _, posted = client.request(Command.REGION_WRITE, RegionAccess(0, 0, 1), b"x", no_reply=True)
    assert posted, "what asks for no answer adds none"


def test_a_reply_must_be_the_commands_own() -> None:
    server = ready_server()
    (request,) = server.receive(read_request(1, 7, 0, 4))
    assert isinstance(request, Request)
    with pytest.raises(LocalProtocolError):
        server.reply(request, DeviceInfo(16))
    with pytest.raises(LocalProtocolError):
        server.reply(request, request.body, b"abcd", fds=[3])


def test_closing_ends_everything_and_gives_back_descriptors() -> None:
    server = ready_server()
    assert server.receive(message(1, wire.DMA_MAP, bytes(32))[:20], [50]) == []
    assert not server.at_boundary
    assert server.close() == (50,)
    assert server.closed
    assert server.close() == ()
    with pytest.raises(LocalProtocolError):
        server.receive(b"")
