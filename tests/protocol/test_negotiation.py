"""What both ends agree on with VERSION beyond its number: writes in one message, and the twin socket."""

from __future__ import annotations

import json
import struct
from errno import EOPNOTSUPP, EPROTO

import pytest

from protocol import (
    Broken,
    Command,
    Connection,
    Limits,
    LocalProtocolError,
    Negotiated,
    Refused,
    Reply,
    Request,
    Role,
)
from protocol.messages import DmaAccess, RegionAccess, WriteMulti
from protocol.write_multi import pack_writes
from tests.protocol import wire
from tests.protocol.wire import message, proposal

TWIN = b'{"capabilities":{"max_msg_fds":1,"twin_socket":{"supported":true}}}\0'
TWIN_AGREED = b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":true,"fd_index":0}}}\0'


def negotiated(server: Connection, said: bytes) -> Negotiated:
    (event,) = server.receive(proposal(json=said))
    assert isinstance(event, Negotiated)
    return event


def answered(event: Negotiated) -> dict[str, object]:
    capabilities = json.loads(event.reply[20:-1])["capabilities"]
    assert isinstance(capabilities, dict)
    return capabilities


def agreement(said: bytes, fds: tuple[int, ...] = (), limits: Limits | None = None) -> object:
    """What a client reports of a server's answer."""
    client = Connection(Role.CLIENT, limits)
    client.propose()
    payload = struct.pack("=HH", 0, 1) + said
    (event,) = client.receive(message(0, wire.VERSION, payload, flags=wire.REPLY), fds)
    assert event.fds == fds
    return event


def pair(client_limits: Limits, server_limits: Limits) -> tuple[Connection, Connection]:
    """A client and a server of ours that came to terms."""
    client, server = Connection(Role.CLIENT, client_limits), Connection(Role.SERVER, server_limits)
    (said,) = server.receive(client.propose())
    assert isinstance(said, Negotiated)
    (agreed,) = client.receive(said.reply, (33,) if said.twin else ())
    assert isinstance(agreed, Negotiated)
    assert agreed.twin_fd == (33 if said.twin else None)
    return client, server


# the twin socket


def test_a_server_gives_a_twin_socket_to_who_asks() -> None:
    event = negotiated(Connection(Role.SERVER), TWIN)
    assert event.twin
    assert answered(event)["twin_socket"] == {"supported": True, "fd_index": 0}


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b'{"capabilities":{"max_msg_fds":8}}\0',
        b'{"capabilities":{"max_msg_fds":8,"twin_socket":{}}}\0',
        b'{"capabilities":{"max_msg_fds":8,"twin_socket":{"supported":false}}}\0',
        b'{"capabilities":{"max_msg_fds":0,"twin_socket":{"supported":true}}}\0',
    ],
)
def test_who_does_not_ask_or_takes_no_descriptor_gets_none(said: bytes) -> None:
    server = Connection(Role.SERVER)
    event = negotiated(server, said)
    assert not event.twin
    assert "twin_socket" not in answered(event)
    with pytest.raises(LocalProtocolError):
        server.twin()


def test_a_server_may_be_told_not_to_give_one() -> None:
    event = negotiated(Connection(Role.SERVER, Limits(twin_socket=False)), TWIN)
    assert not event.twin
    assert "twin_socket" not in answered(event)


def test_a_client_finds_the_descriptor_that_the_server_names() -> None:
    said = b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":1}}}\0'
    event = agreement(said, (40, 41))
    assert isinstance(event, Negotiated)
    assert event.twin_fd == 41


@pytest.mark.parametrize(
    ("said", "fds"),
    [
        (b'{"capabilities":{"twin_socket":{"supported":true}}}\0', (40,)),
        (b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":1}}}\0', (40,)),
        (b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}\0', ()),
        (b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":18446744073709551615}}}\0', (40,)),
        (b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":-1}}}\0', (40,)),
        (TWIN_AGREED, tuple(range(40, 57))),
    ],
)
def test_a_twin_socket_that_is_not_there_ends_it(said: bytes, fds: tuple[int, ...]) -> None:
    event = agreement(said, fds)
    assert isinstance(event, Broken)
    assert event.error.errno == EPROTO


def test_a_twin_socket_that_nobody_asked_for_ends_it() -> None:
    event = agreement(TWIN_AGREED, (40,), Limits(twin_socket=False))
    assert isinstance(event, Broken)
    assert isinstance(agreement(TWIN_AGREED, (40,)), Negotiated)


def test_a_server_without_one_is_accepted() -> None:
    said = b'{"capabilities":{"twin_socket":{"supported":false,"fd_index":5}}}\0'
    event = agreement(said)
    assert isinstance(event, Negotiated)
    assert event.twin_fd is None


def test_the_servers_commands_go_over_the_twin_alone() -> None:
    client, server = pair(Limits(), Limits())
    with pytest.raises(LocalProtocolError) as refusal:
        server.request(Command.DMA_READ, DmaAccess(0x1000, 4))
    assert refusal.value.errno == EOPNOTSUPP
    ours, theirs = server.twin(), client.twin()
    assert ours.ready
    assert theirs.ready
    message_id, sent = ours.request(Command.DMA_READ, DmaAccess(0x1000, 4))
    (asked,) = theirs.receive(sent)
    assert isinstance(asked, Request)
    (answer,) = ours.receive(theirs.reply(asked, asked.body, b"data"))
    assert answer == Reply(Command.DMA_READ, message_id, DmaAccess(0x1000, 4), b"data")


def test_the_clients_commands_do_not_go_over_the_twin() -> None:
    client, server = pair(Limits(), Limits())
    with pytest.raises(LocalProtocolError):
        client.twin().request(Command.REGION_READ, RegionAccess(0, 7, 4))
    (refused,) = server.twin().receive(wire.read_request(1, 7, 0, 4))
    assert isinstance(refused, Refused)
    assert client.request(Command.REGION_READ, RegionAccess(0, 7, 4))


def test_a_client_answers_on_the_main_socket_too() -> None:
    client, _ = pair(Limits(), Limits())
    payload = struct.pack("=QQ", 0x1000, 4)
    (asked,) = client.receive(message(1, wire.DMA_READ, payload))
    assert isinstance(asked, Request)


def test_a_twin_has_no_twin_and_a_breach_there_does_not_end_the_main_socket() -> None:
    client, server = pair(Limits(), Limits())
    twin = client.twin()
    with pytest.raises(LocalProtocolError):
        twin.twin()
    (broken,) = twin.receive(bytes(16))
    assert isinstance(broken, Broken)
    assert client.ready
    assert server.ready


def test_without_a_twin_the_servers_commands_go_over_the_main_socket() -> None:
    client, server = pair(Limits(twin_socket=False), Limits())
    message_id, sent = server.request(Command.DMA_WRITE, DmaAccess(0x1000, 3), b"abc")
    (asked,) = client.receive(sent)
    assert isinstance(asked, Request)
    assert asked.data == b"abc"
    (answer,) = server.receive(client.reply(asked, asked.body))
    assert answer == Reply(Command.DMA_WRITE, message_id, DmaAccess(0x1000, 3), b"")


def test_both_directions_share_a_socket_with_equal_ids() -> None:
    client, server = pair(Limits(twin_socket=False), Limits())
    server._next_id = client._next_id
    reading, asked_up = client.request(Command.REGION_READ, RegionAccess(0, 7, 4))
    fetching, asked_down = server.request(Command.DMA_READ, DmaAccess(0, 4))
    assert reading == fetching
    (region,) = server.receive(asked_up)
    (memory,) = client.receive(asked_down)
    assert isinstance(region, Request)
    assert isinstance(memory, Request)
    (got,) = client.receive(server.reply(region, region.body, b"conf"))
    (fetched,) = server.receive(client.reply(memory, memory.body, b"dram"))
    assert got == Reply(Command.REGION_READ, reading, RegionAccess(0, 7, 4), b"conf")
    assert fetched == Reply(Command.DMA_READ, fetching, DmaAccess(0, 4), b"dram")


# writes in one message


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("theirs", [True, False])
def test_writes_in_one_message_need_both_ends(ours: bool, theirs: bool) -> None:
    client, server = pair(Limits(write_multiple=ours), Limits(write_multiple=theirs))
    assert client.write_multiple == server.write_multiple == (ours and theirs)
    writes = [(0, 0x3000, b"\1\0")]
    sent = message(7, wire.WRITE_MULTI, struct.pack("=Q", 1) + pack_writes(writes))
    (event,) = server.receive(sent)
    if ours and theirs:
        assert isinstance(event, Request)
        assert client.request(Command.REGION_WRITE_MULTI, WriteMulti(1), pack_writes(writes))
    else:
        assert isinstance(event, Refused)
        assert event.errno == EOPNOTSUPP
        with pytest.raises(LocalProtocolError):
            client.request(Command.REGION_WRITE_MULTI, WriteMulti(1), pack_writes(writes))


def test_who_is_not_asked_about_writes_in_one_message_says_nothing_of_them() -> None:
    server = Connection(Role.SERVER)
    assert "write_multiple" not in answered(negotiated(server, b'{"capabilities":{}}\0'))
