"""Messages built by hand from the spec's tables, without the engine's encoder: an independent witness."""

from __future__ import annotations

import struct

from protocol import Connection, Negotiated, Role

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, IRQ_INFO, SET_IRQS = 1, 2, 3, 4, 5, 7, 8
REGION_READ, REGION_WRITE, DMA_READ, RESET = 9, 10, 11, 13
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


def ready_server() -> Connection:
    """A server that agreed on a version with a client that takes 16 descriptors."""
    server = Connection(Role.SERVER)
    (event,) = server.receive(proposal(json=b'{"capabilities":{"max_msg_fds":16}}\0'))
    assert isinstance(event, Negotiated)
    return server


def ready_client() -> Connection:
    """A client that agreed on a version with a server that takes 8 descriptors."""
    client = Connection(Role.CLIENT)
    sent = client.propose()
    message_id = struct.unpack_from("=H", sent)[0]
    payload = struct.pack("=HH", 0, 1) + b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536}}\0'
    (event,) = client.receive(message(message_id, VERSION, payload, flags=REPLY))
    assert isinstance(event, Negotiated)
    return client
