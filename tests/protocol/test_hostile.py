"""What a peer that breaks the rules gets: a refusal where the stream is sound, the end where it is not;
never an exception.
"""

from __future__ import annotations

import struct
from errno import EINVAL, EIO, EOPNOTSUPP, EPROTO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import (
    BadReply,
    Broken,
    Command,
    Connection,
    ErrorReply,
    Limits,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    Request,
    Role,
)
from protocol.limits import (
    MAX_CAPABILITIES,
    MAX_ERRNO,
    MAX_JSON_NUMBER,
    MAX_VERSION_DATA,
    MAX_WRITE_SIZE,
)
from protocol.messages import (
    CapabilityHeader,
    DeviceInfo,
    DmaUnmap,
    IrqInfo,
    RegionAccess,
    RegionInfo,
    WriteMulti,
    WriteMultiEntry,
)
from protocol.region_info import parse_capabilities_chain
from protocol.vfio import DmaUnmapFlags, RegionFlags
from protocol.write_multi import parse_writes
from tests.protocol import wire
from tests.protocol.wire import (
    message,
    proposal,
    read_request,
    ready_client,
    ready_server,
    refused,
    write_request,
)


def the_end(events: list[object]) -> Broken:
    assert isinstance(events[-1], Broken)
    assert events[-1].error.fatal
    return events[-1]


# the frame


@pytest.mark.parametrize("size", [0, 1, 15, 16 + 40 + (1 << 20) + 1, 0xFFFF_FFFF])
def test_a_size_that_cannot_be_is_the_end(size: int) -> None:
    server = ready_server()
    header = struct.pack("=HHIII", 3, wire.REGION_READ, size, 0, 0)
    broken = the_end(list(server.receive(read_request(2, 7, 0, 4) + header)))
    assert broken.farewell == message(3, wire.REGION_READ, flags=wire.REPLY | wire.ERROR, error=EINVAL)
    assert server.closed
    with pytest.raises(LocalProtocolError):
        server.receive(b"more")


def test_the_largest_message_is_read() -> None:
    server = Connection(Role.SERVER, Limits(max_data_xfer_size=1 << 20))
    server.receive(proposal())
    (request,) = server.receive(write_request(1, 2, 0, bytes(1 << 20)))
    assert isinstance(request, Request)
    assert len(request.data) == 1 << 20


@pytest.mark.parametrize("kind", range(2, 16))
def test_a_type_that_is_neither_command_nor_reply_is_the_end(kind: int) -> None:
    broken = the_end(list(ready_server().receive(message(1, wire.RESET, flags=kind))))
    assert broken.farewell == b""


def test_before_the_end_earlier_messages_are_reported_and_can_be_answered() -> None:
    server = ready_server()
    events = server.receive(
        read_request(2, 7, 0, 4)
        + message(3, wire.GET_INFO, b"")
        + write_request(4, 0, 0, b"x", flags=wire.NO_REPLY)
        + bytes(16)
    )
    request, refusal, posted, _ = events
    assert isinstance(request, Request)
    assert isinstance(refusal, Refused)
    assert isinstance(posted, Request)
    the_end(list(events))
    answer = struct.pack("=QII", 0, 7, 4) + b"conf"
    assert server.reply(request, request.body, b"conf") == message(2, 9, answer, flags=wire.REPLY)
    assert server.error(refusal, refusal.errno) == message(3, 4, flags=wire.REPLY | wire.ERROR, error=22)
    assert server.reply(posted, posted.body) == b""


def test_after_the_end_nothing_else_may_be_sent() -> None:
    client = ready_client()
    asked, _ = client.receive(message(1, wire.DMA_READ, struct.pack("=QQ", 0, 4)) + bytes(16))
    assert isinstance(asked, Request)
    with pytest.raises(LocalProtocolError):
        client.request(Command.DEVICE_RESET)
    assert client.error(asked, 14)
    client.close()
    with pytest.raises(LocalProtocolError):
        client.error(asked, 14)


# replies


def test_a_reply_that_nobody_asked_for_is_the_end() -> None:
    for connection in (ready_server(), ready_client()):
        broken = the_end(list(connection.receive(message(77, wire.REGION_READ, flags=wire.REPLY))))
        assert broken.error.errno == EPROTO
        assert broken.farewell == b""


def test_a_reply_with_the_right_id_and_the_wrong_command_is_the_end() -> None:
    client = ready_client()
    message_id, _ = client.request(Command.DEVICE_RESET)
    the_end(list(client.receive(message(message_id, wire.REGION_READ, bytes(16), flags=wire.REPLY))))


def test_a_second_reply_is_the_end() -> None:
    client = ready_client()
    message_id, _ = client.request(Command.DEVICE_RESET)
    answer = message(message_id, wire.RESET, flags=wire.REPLY)
    the_end(list(client.receive(answer + answer)))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(15),
        struct.pack("=QII", 0, 7, 4) + b"abc",
        struct.pack("=QII", 0, 7, 4) + b"abcde",
        struct.pack("=QII", 0, 7, 5) + b"abcde",
        struct.pack("=QII", 4, 7, 4) + b"abcd",
        struct.pack("=QII", 0, 6, 4) + b"abcd",
    ],
)
def test_nonsense_in_a_reply_fails_its_request_alone(payload: bytes) -> None:
    client = ready_client()
    message_id, _ = client.request(Command.REGION_READ, RegionAccess(0, 7, 4))
    (event,) = client.receive(message(message_id, wire.REGION_READ, payload, flags=wire.REPLY))
    assert isinstance(event, BadReply)
    assert (event.command, event.message_id) == (Command.REGION_READ, message_id)
    assert client.ready


@pytest.mark.parametrize(
    ("command", "asked", "answer"),
    [
        (Command.DMA_UNMAP, DmaUnmap(24, DmaUnmapFlags(0), 0x1000, 0x1000), (24, 0, 0x2000, 0x1000)),
        (Command.DMA_UNMAP, DmaUnmap(24, DmaUnmapFlags(0), 0x1000, 0x1000), (24, 0, 0x1000, 0x2000)),
        (Command.DEVICE_GET_IRQ_INFO, IrqInfo(16, index=1), (16, 1, 2, 4)),
    ],
)
def test_a_reply_about_something_else_fails_its_request_alone(
    command: Command, asked: DmaUnmap | IrqInfo, answer: tuple[int, ...]
) -> None:
    client = ready_client()
    message_id, _ = client.request(command, asked)
    payload = struct.pack("=IIQQ" if command is Command.DMA_UNMAP else "=IIII", *answer)
    (event,) = client.receive(message(message_id, command, payload, flags=wire.REPLY))
    assert isinstance(event, BadReply)
    assert client.ready


@pytest.mark.parametrize(("offset", "region"), [(1, 0), (0, 1)])
def test_a_write_answered_for_another_place_fails_alone(offset: int, region: int) -> None:
    client = ready_client()
    message_id, _ = client.request(Command.REGION_WRITE, RegionAccess(0, 0, 4), b"abcd")
    payload = struct.pack("=QII", offset, region, 4)
    (event,) = client.receive(message(message_id, Command.REGION_WRITE, payload, flags=wire.REPLY))
    assert isinstance(event, BadReply)
    assert client.ready


def test_a_reply_with_too_many_descriptors_fails_its_request_alone() -> None:
    client = ready_client()
    message_id, _ = client.request(Command.DEVICE_GET_INFO, DeviceInfo(16))
    answer = message(message_id, wire.GET_INFO, bytes(16), flags=wire.REPLY)
    (event,) = client.receive(answer, range(17))
    assert isinstance(event, BadReply)
    assert event.fds == tuple(range(17))


# order


@pytest.mark.parametrize("command", [c for c in range(20) if c != wire.VERSION])
def test_a_command_before_version_is_the_end(command: int) -> None:
    server = Connection(Role.SERVER)
    broken = the_end(list(server.receive(message(8, command, bytes(16)), [30])))
    assert broken.farewell == message(8, command, flags=wire.REPLY | wire.ERROR, error=EINVAL)
    assert broken.fds == (30,)


def test_a_second_version_is_refused() -> None:
    assert refused(struct.pack("=HH", 0, 0), wire.VERSION).errno == EINVAL


def test_a_command_to_a_client_that_still_negotiates_is_the_end() -> None:
    client = Connection(Role.CLIENT)
    client.propose()
    the_end(list(client.receive(message(0, wire.DMA_READ, bytes(16)))))


@pytest.mark.parametrize(
    "first",
    [
        proposal(major=1),
        proposal(json=b"{"),
        message(0, wire.VERSION, b"\0\0\0"),
        message(0, wire.VERSION, bytes(4), flags=wire.NO_REPLY),
        message(0, wire.VERSION, bytes(4), flags=wire.ERROR),
        proposal(json=b'{"capabilities":{"max_msg_fds":null,"pgsizes":"4k"}}\0'),
    ],
)
def test_a_version_that_cannot_be_agreed_on_is_the_end(first: bytes) -> None:
    server = Connection(Role.SERVER)
    the_end(list(server.receive(first)))
    assert not server.ready


def test_nothing_large_is_buffered_for_a_stranger() -> None:
    server = Connection(Role.SERVER)
    header = struct.pack("=HHIII", 0, wire.VERSION, 20 + MAX_VERSION_DATA + 1, 0, 0)
    the_end(list(server.receive(header)))


@pytest.mark.parametrize(
    "answer",
    [
        struct.pack("=HH", 1, 0),
        struct.pack("=HH", 0, 3),
        b"\0\0",
        struct.pack("=HH", 0, 0) + b"{}",
    ],
)
def test_a_server_that_answers_version_wrongly_is_left(answer: bytes) -> None:
    client = Connection(Role.CLIENT)
    client.propose()
    assert (
        the_end(list(client.receive(message(0, wire.VERSION, answer, flags=wire.REPLY)))).error.errno
        == EPROTO
    )


def test_a_server_that_refuses_version_is_left_with_its_errno() -> None:
    client = Connection(Role.CLIENT)
    client.propose()
    refusal = message(0, wire.VERSION, flags=wire.REPLY | wire.ERROR, error=95)
    assert the_end(list(client.receive(refusal))).error.errno == 95


# requests


@pytest.mark.parametrize("command", [0, 14, 19, 0xFFFF])
def test_unknown_commands_are_refused(command: int) -> None:
    assert refused(b"", command).errno == EINVAL


def test_writes_in_one_message_are_refused_unless_agreed_on() -> None:
    assert refused(bytes(8), wire.WRITE_MULTI).errno == EOPNOTSUPP


@pytest.mark.parametrize("command", [11, 12])
def test_a_server_does_not_take_the_commands_it_sends(command: int) -> None:
    assert refused(bytes(16), command).errno == EINVAL


def test_a_request_with_the_error_flag_is_refused() -> None:
    (refusal,) = ready_server().receive(message(1, wire.RESET, flags=wire.ERROR))
    assert isinstance(refusal, Refused)


def test_a_request_whose_descriptors_the_kernel_dropped_is_refused() -> None:
    server = ready_server()
    (refusal,) = server.receive(message(1, wire.DMA_MAP, bytes(32)), [5], fds_lost=True)
    assert isinstance(refusal, Refused)
    assert refusal.fds == (5,)
    (request,) = server.receive(read_request(1, 7, 0, 4))
    assert isinstance(request, Request)


def test_descriptors_do_not_pile_up_in_a_message_that_never_ends() -> None:
    server = ready_server()
    sent = write_request(1, 2, 0, bytes(100))
    assert server.receive(sent[:1], range(16)) == []
    broken = the_end(list(server.receive(sent[1:2], [99])))
    assert broken.fds == (*range(16), 99)


def test_the_end_gives_back_all_descriptors() -> None:
    server = ready_server()
    server.receive(b"\0\0", [7])
    assert the_end(list(server.receive(bytes(30), [8, 9]))).fds == (7, 8, 9)


def test_the_end_in_the_middle_gives_back_the_descriptors_of_later_messages() -> None:
    server = Connection(Role.SERVER)
    events = server.receive(proposal(major=3) + read_request(1, 7, 0, 4), [8])
    assert the_end(list(events)).fds == (8,)
    assert len(events) == 1


@given(st.binary(max_size=300), st.booleans(), st.lists(st.integers(0, 100), max_size=3))
def test_any_bytes_give_events_and_lose_no_descriptor(data: bytes, negotiated: bool, fds: list[int]) -> None:
    server = ready_server() if negotiated else Connection(Role.SERVER)
    events = server.receive(data, fds)
    given_back = [fd for event in events for fd in event.fds]
    if not server.closed:
        given_back += server.close()
    assert given_back == fds


@given(
    st.integers(0, 20),
    st.binary(max_size=60),
    st.sampled_from([0, 16, 32, 48]),
    st.lists(st.integers(0, 100), max_size=3),
)
def test_any_framed_command_is_a_request_or_a_refusal(
    command: int, payload: bytes, flags: int, fds: list[int]
) -> None:
    server = ready_server(b'{"capabilities":{"max_msg_fds":16,"write_multiple":true}}\0')
    (event,) = server.receive(message(9, command, payload, flags=flags), fds)
    assert isinstance(event, Request | Refused)
    assert event.fds == tuple(fds)
    assert event.no_reply == bool(flags & 16)


@given(st.integers(1, 18), st.binary(max_size=60), st.sampled_from([1, 33]), st.integers(0, 2**32 - 1))
def test_any_framed_reply_answers_or_ends(command: int, payload: bytes, flags: int, error: int) -> None:
    client = ready_client()
    message_id, _ = client.request(Command.DEVICE_GET_INFO, DeviceInfo(16))
    events = client.receive(message(message_id, command, payload, flags=flags, error=error))
    assert len(events) == 1
    assert client.closed == (command != Command.DEVICE_GET_INFO)


# limits, each met and exceeded by one


@pytest.mark.parametrize(("number", "taken"), [(MAX_JSON_NUMBER, True), (MAX_JSON_NUMBER + 1, False)])
def test_a_capability_has_64_bits(number: int, taken: bool) -> None:
    server = Connection(Role.SERVER)
    server.receive(proposal(json=b'{"capabilities":{"max_dma_maps":%d}}\0' % number))
    assert server.ready is taken


@pytest.mark.parametrize(("number", "told"), [(MAX_ERRNO, MAX_ERRNO), (MAX_ERRNO + 1, EIO)])
def test_an_errno_is_one_that_linux_knows(number: int, told: int) -> None:
    client = ready_client()
    message_id, _ = client.request(Command.DEVICE_RESET)
    (event,) = client.receive(message(message_id, wire.RESET, flags=wire.REPLY | wire.ERROR, error=number))
    assert isinstance(event, ErrorReply)
    assert event.errno == told


@pytest.mark.parametrize(
    ("count", "taken"), [(MAX_WRITE_SIZE, True), (MAX_WRITE_SIZE + 1, False), (0, False)]
)
def test_one_of_many_writes_has_eight_bytes(count: int, taken: bool) -> None:
    data = WriteMultiEntry(0, 0, count, bytes(8)).encode()
    if taken:
        assert parse_writes(WriteMulti(1), data) == ((0, 0, bytes(8)),)
    else:
        with pytest.raises(RemoteProtocolError):
            parse_writes(WriteMulti(1), data)


@pytest.mark.parametrize("links", [MAX_CAPABILITIES, MAX_CAPABILITIES + 1])
def test_a_chain_of_capabilities_has_an_end(links: int) -> None:
    last = RegionInfo.size + 8 * (links - 1)
    starts = range(RegionInfo.size, last + 1, 8)
    data = b"".join(CapabilityHeader(9, 1, 0 if at == last else at + 8).encode() for at in starts)
    info = RegionInfo(RegionInfo.size, RegionFlags.READ | RegionFlags.CAPS, 0, RegionInfo.size, 4096)
    if links == MAX_CAPABILITIES:
        assert len(parse_capabilities_chain(info, data)) == links
    else:
        with pytest.raises(RemoteProtocolError, match="more than"):
            parse_capabilities_chain(info, data)
