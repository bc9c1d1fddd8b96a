"""Messages built by hand from the spec's tables, without the engine's encoder: an independent witness."""

from __future__ import annotations

import struct

from protocol import Connection, Negotiated, Overrides, Refused, Request, Role

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, IRQ_INFO, SET_IRQS = 1, 2, 3, 4, 5, 7, 8
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET = 9, 10, 11, 12, 13
IO_FDS, WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE = 6, 15, 16, 17, 18
REPLY, NO_REPLY, ERROR = 1, 16, 32


def message(message_id: int, command: int, payload: bytes = b"", *, flags: int = 0, error: int = 0) -> bytes:
    """A message with the right size in its header."""
    return struct.pack("=HHIII", message_id, command, 16 + len(payload), flags, error) + payload


def proposal(*, major: int = 0, minor: int = 0, json: bytes = b"", message_id: int = 0) -> bytes:
    """A client's VERSION."""
    return message(message_id, VERSION, struct.pack("=HH", major, minor) + json)


def read_request(message_id: int, region: int, offset: int, count: int, *, flags: int = 0) -> bytes:
    """A REGION_READ."""
    return message(message_id, REGION_READ, struct.pack("=QII", offset, region, count), flags=flags)


def write_request(message_id: int, region: int, offset: int, data: bytes, *, flags: int = 0) -> bytes:
    """A REGION_WRITE."""
    return message(
        message_id, REGION_WRITE, struct.pack("=QII", offset, region, len(data)) + data, flags=flags
    )


PLAIN_CLIENT = b'{"capabilities":{"max_msg_fds":16}}\0'
PLAIN_SERVER = b'{"capabilities":{"max_msg_fds":7,"max_data_xfer_size":65536}}\0'


def ready_server(
    json: bytes = PLAIN_CLIENT, *, minor: int = 0, quirks: Overrides | None = None
) -> Connection:
    """A server that agreed on a version with a client, if nothing is said with one that takes 16
    descriptors.
    """
    server = Connection(Role.SERVER, quirks=quirks)
    (event,) = server.receive(proposal(json=json, minor=minor))
    assert isinstance(event, Negotiated)
    return server


def ready_client(
    json: bytes = PLAIN_SERVER,
    *,
    minor: int = 1,
    fds: tuple[int, ...] = (),
    quirks: Overrides | None = None,
) -> Connection:
    """A client that agreed on a version with a server, if nothing is said with one that takes 7
    descriptors.
    """
    client = Connection(Role.CLIENT, quirks=quirks)
    sent = client.propose()
    message_id = struct.unpack_from("=H", sent)[0]
    payload = struct.pack("=HH", 0, minor) + json
    (event,) = client.receive(message(message_id, VERSION, payload, flags=REPLY), fds)
    assert isinstance(event, Negotiated)
    return client


def refused(payload: bytes, command: int, fds: tuple[int, ...] = ()) -> Refused:
    """The refusal of a request, after which the server still serves."""
    server = ready_server()
    (refusal,) = server.receive(message(3, command, payload), fds)
    (after,) = server.receive(read_request(4, 7, 0, 4))
    assert isinstance(refusal, Refused)
    assert isinstance(after, Request)
    assert refusal.fds == fds
    errno = refusal.errno
    assert server.error(refusal, errno) == message(3, command, flags=REPLY | ERROR, error=errno)
    return refusal
