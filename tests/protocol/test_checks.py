"""Requests and replies that are framed well and make no sense: each fails alone."""

from __future__ import annotations

import struct
from errno import EINVAL

import pytest

from protocol import BadReply, Command, Refused
from protocol.limits import MAX_IRQS_PER_SET
from protocol.messages import (
    Bitmap,
    DeviceFeature,
    DmaAccess,
    DmaLoggingReport,
    DmaUnmap,
    MigData,
    Record,
    RegionIoFds,
    WriteMulti,
)
from protocol.vfio import DmaUnmapFlags, FeatureFlags
from protocol.write_multi import pack_writes
from tests.protocol import wire
from tests.protocol.wire import message, ready_client, ready_server, refused

GET = FeatureFlags.GET
SPAN = DmaLoggingReport(0, 0x4000, 0x1000).encode()
UNMAP = DmaUnmap(48, DmaUnmapFlags.GET_DIRTY_BITMAP, 0, 0x4000)
BITMAP = Bitmap(0x1000, 8).encode()


SET = "=IIIII"
TRIGGER, MASK = 1 << 5, 1 << 3
NONE, BOOL, EVENTFD = 1, 2, 4

MALFORMED: list[tuple[str, int, bytes, tuple[int, ...]]] = [
    ("dma map too short", wire.DMA_MAP, bytes(31), ()),
    ("dma map argsz", wire.DMA_MAP, struct.pack("=IIQQQ", 31, 3, 0, 0, 4096), ()),
    ("dma map empty", wire.DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 4096, 0), ()),
    ("dma map wraps", wire.DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 2**64 - 4096, 4097), ()),
    ("dma map offset wraps", wire.DMA_MAP, struct.pack("=IIQQQ", 32, 3, 2**64 - 1, 0, 4096), (9,)),
    ("dma map two descriptors", wire.DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0, 4096), (9, 10)),
    ("dma unmap argsz", wire.DMA_UNMAP, struct.pack("=IIQQ", 23, 0, 0, 4096), ()),
    ("dma unmap wraps", wire.DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 4096, 2**64 - 1), ()),
    ("info argsz 0", wire.GET_INFO, bytes(16), ()),
    ("info argsz 15", wire.GET_INFO, struct.pack("=IIII", 15, 0, 0, 0), ()),
    ("info too short", wire.GET_INFO, struct.pack("=III", 16, 0, 0), ()),
    ("region info argsz", wire.REGION_INFO, struct.pack("=IIIIQQ", 31, 0, 0, 0, 0, 0), ()),
    ("irq info argsz", wire.IRQ_INFO, struct.pack("=IIII", 8, 0, 0, 0), ()),
    ("irqs too short", wire.SET_IRQS, bytes(19), ()),
    ("irqs argsz", wire.SET_IRQS, struct.pack(SET, 19, NONE | TRIGGER, 0, 0, 0), ()),
    ("irqs no data flag", wire.SET_IRQS, struct.pack(SET, 20, TRIGGER, 0, 0, 1), ()),
    ("irqs no action", wire.SET_IRQS, struct.pack(SET, 20, NONE, 0, 0, 1), ()),
    ("irqs two data flags", wire.SET_IRQS, struct.pack(SET, 20, NONE | BOOL | TRIGGER, 0, 0, 1), ()),
    ("irqs two actions", wire.SET_IRQS, struct.pack(SET, 20, NONE | MASK | TRIGGER, 0, 0, 1), ()),
    ("irqs unknown flag", wire.SET_IRQS, struct.pack(SET, 20, NONE | TRIGGER | 64, 0, 0, 1), ()),
    ("irqs overflow", wire.SET_IRQS, struct.pack(SET, 20, NONE | TRIGGER, 2, 2**32 - 1, 2), ()),
    ("irqs many", wire.SET_IRQS, struct.pack(SET, 20, NONE | TRIGGER, 2, 0, MAX_IRQS_PER_SET + 1), ()),
    ("irqs billions", wire.SET_IRQS, struct.pack(SET, 20, NONE | TRIGGER, 2, 0, 2**32 - 1), ()),
    ("irqs few booleans", wire.SET_IRQS, struct.pack(SET, 21, BOOL | TRIGGER, 2, 0, 2) + b"\1", ()),
    ("irqs many booleans", wire.SET_IRQS, struct.pack(SET, 23, BOOL | TRIGGER, 2, 0, 2) + b"\1\1\1", ()),
    ("irqs few descriptors", wire.SET_IRQS, struct.pack(SET, 20, EVENTFD | TRIGGER, 2, 0, 2), (9,)),
    ("irqs many descriptors", wire.SET_IRQS, struct.pack(SET, 20, EVENTFD | TRIGGER, 2, 0, 1), (9, 10)),
    ("irqs idle descriptors", wire.SET_IRQS, struct.pack(SET, 20, NONE | TRIGGER, 2, 0, 1), (9,)),
    ("read too short", wire.REGION_READ, bytes(15), ()),
    ("read too long", wire.REGION_READ, struct.pack("=QII", 0, 7, 4) + b"x", ()),
    ("read too much", wire.REGION_READ, struct.pack("=QII", 0, 7, (1 << 20) + 1), ()),
    ("read four gigabytes", wire.REGION_READ, struct.pack("=QII", 0, 7, 2**32 - 1), ()),
    ("read wraps", wire.REGION_READ, struct.pack("=QII", 2**64 - 2, 7, 4), ()),
    ("write too little", wire.REGION_WRITE, struct.pack("=QII", 0, 7, 4) + b"abc", ()),
    ("write too much", wire.REGION_WRITE, struct.pack("=QII", 0, 7, 4) + b"abcde", ()),
    ("write wraps", wire.REGION_WRITE, struct.pack("=QII", 2**64 - 2, 7, 4) + b"abcd", ()),
    ("reset with a payload", wire.RESET, b"now", ()),
    ("dirty bitmap missing", wire.DMA_UNMAP, struct.pack("=IIQQ", 64, 1, 0, 4096), ()),
    ("dirty bitmap cut", wire.DMA_UNMAP, struct.pack("=IIQQQ", 64, 1, 0, 4096, 4096), ()),
    ("dirty bitmap of everything", wire.DMA_UNMAP, struct.pack("=IIQQQQ", 64, 3, 0, 4096, 4096, 8), ()),
    ("dirty bitmap of nothing", wire.DMA_UNMAP, struct.pack("=IIQQQQ", 64, 1, 0, 0, 4096, 8), ()),
    ("dirty bitmap page", wire.DMA_UNMAP, struct.pack("=IIQQQQ", 64, 1, 0, 4096, 4097, 8), ()),
    ("dirty bitmap no page", wire.DMA_UNMAP, struct.pack("=IIQQQQ", 64, 1, 0, 4096, 0, 8), ()),
    ("dirty bitmap too small", wire.DMA_UNMAP, struct.pack("=IIQQQQ", 64, 1, 0, 4096 * 65, 4096, 8), ()),
    ("dirty bitmap argsz", wire.DMA_UNMAP, struct.pack("=IIQQQQ", 47, 1, 0, 4096, 4096, 8), ()),
    (
        "dirty bitmap too large",
        wire.DMA_UNMAP,
        struct.pack("=IIQQQQ", 2**32 - 1, 1, 0, 4096, 4096, (1 << 20) + 1),
        (),
    ),
    (
        "dirty bitmap of the address space",
        wire.DMA_UNMAP,
        struct.pack("=IIQQQQ", 2**32 - 1, 1, 0, 2**64 - 1, 1, 8),
        (),
    ),
    ("io fds argsz", wire.IO_FDS, struct.pack("=IIII", 15, 0, 0, 0), ()),
    ("io fds flags", wire.IO_FDS, struct.pack("=IIII", 64, 1, 0, 0), ()),
    ("io fds count", wire.IO_FDS, struct.pack("=IIII", 64, 0, 0, 1), ()),
    ("io fds too short", wire.IO_FDS, bytes(12), ()),
    ("feature too short", wire.FEATURE, bytes(7), ()),
    ("feature without a method", wire.FEATURE, struct.pack("=II", 64, 1), ()),
    ("feature got and set", wire.FEATURE, struct.pack("=II", 64, 0x30001), ()),
    ("feature unknown flag", wire.FEATURE, struct.pack("=II", 64, 0x90001), ()),
    ("feature argsz", wire.FEATURE, struct.pack("=II", 15, 0x10001), ()),
    ("migration read argsz", wire.MIG_READ, struct.pack("=II", 15, 8), ()),
    ("migration read too much", wire.MIG_READ, struct.pack("=II", 2**32 - 1, (1 << 20) + 1), ()),
    ("migration read too short", wire.MIG_READ, bytes(7), ()),
    ("migration write too little", wire.MIG_WRITE, struct.pack("=II", 64, 8) + bytes(7), ()),
    ("migration write too much", wire.MIG_WRITE, struct.pack("=II", 64, 8) + bytes(9), ()),
    ("too many descriptors", wire.DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0, 4096), tuple(range(17))),
]


@pytest.mark.parametrize(("what", "command", "payload", "fds"), MALFORMED, ids=[row[0] for row in MALFORMED])
def test_a_malformed_request_is_refused(
    what: str, command: int, payload: bytes, fds: tuple[int, ...]
) -> None:
    assert refused(payload, command, fds).errno == EINVAL


MEMORY: list[tuple[str, int, bytes]] = [
    ("read too short", wire.DMA_READ, bytes(15)),
    ("read too long", wire.DMA_READ, bytes(17)),
    ("read too much", wire.DMA_READ, struct.pack("=QQ", 0, (1 << 20) + 1)),
    ("read everything", wire.DMA_READ, struct.pack("=QQ", 0, 2**64 - 1)),
    ("read wraps", wire.DMA_READ, struct.pack("=QQ", 2**64 - 2, 4)),
    ("write too little", wire.DMA_WRITE, struct.pack("=QQ", 0, 4) + b"abc"),
    ("write too much", wire.DMA_WRITE, struct.pack("=QQ", 0, 4) + b"abcde"),
    ("write wraps", wire.DMA_WRITE, struct.pack("=QQ", 2**64 - 2, 4) + b"abcd"),
    ("region read", wire.REGION_READ, struct.pack("=QII", 0, 7, 4)),
    ("unknown", 0xFFFF, b""),
]


@pytest.mark.parametrize(("what", "command", "payload"), MEMORY, ids=[row[0] for row in MEMORY])
def test_a_server_that_asks_for_nonsense_is_refused(what: str, command: int, payload: bytes) -> None:
    client = ready_client()
    (refusal,) = client.receive(message(3, command, payload))
    assert isinstance(refusal, Refused)
    assert refusal.errno == EINVAL
    assert client.ready


NONSENSE: list[tuple[Command, Record, bytes, bytes]] = [
    (Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(64, index=2), b"", struct.pack("=IIII", 16, 0, 1, 0)),
    (Command.DEVICE_GET_REGION_IO_FDS, RegionIoFds(64, index=2), b"", struct.pack("=IIII", 16, 0, 2, 513)),
    (Command.MIG_DATA_READ, MigData(24, 16), b"", struct.pack("=II", 25, 17) + bytes(17)),
    (Command.MIG_DATA_READ, MigData(24, 16), b"", struct.pack("=II", 24, 16) + bytes(15)),
    (Command.MIG_DATA_WRITE, MigData(9, 1), b"x", b"thanks"),
    (Command.DEVICE_FEATURE, DeviceFeature(16, GET | 1), b"", struct.pack("=IIQ", 16, 0x10002, 0)),
    (Command.DEVICE_FEATURE, DeviceFeature(16, GET | 1), b"", struct.pack("=III", 12, 0x10001, 0)),
    (Command.DEVICE_FEATURE, DeviceFeature(40, GET | 8), SPAN, struct.pack("=II", 32, 0x10008) + SPAN),
    (Command.DEVICE_FEATURE, DeviceFeature(40, GET | 8), SPAN, struct.pack("=II", 40, 0x10008) + bytes(32)),
    (Command.DMA_UNMAP, UNMAP, BITMAP, UNMAP.encode() + BITMAP + bytes(7)),
    (Command.DMA_UNMAP, UNMAP, BITMAP, UNMAP.encode() + BITMAP + bytes(9)),
    (Command.DMA_UNMAP, UNMAP, BITMAP, UNMAP.encode() + bytes(16) + bytes(8)),
    (Command.DMA_UNMAP, UNMAP, BITMAP, UNMAP.encode()),
]


@pytest.mark.parametrize(("command", "asked", "sent", "answer"), NONSENSE)
def test_an_answer_to_something_else_fails_its_request_alone(
    command: Command, asked: Record, sent: bytes, answer: bytes
) -> None:
    client = ready_client()
    message_id, _ = client.request(command, asked, sent)
    (event,) = client.receive(message(message_id, command, answer, flags=wire.REPLY))
    assert isinstance(event, BadReply)
    assert client.ready


def test_more_writes_done_than_were_asked_for_fail_alone() -> None:
    client = ready_client(b'{"capabilities":{"max_msg_fds":9,"write_multiple":true}}\0')
    message_id, _ = client.request(Command.REGION_WRITE_MULTI, WriteMulti(1), pack_writes([(0, 0, b"x")]))
    (event,) = client.receive(message(message_id, wire.WRITE_MULTI, struct.pack("=Q", 2), flags=wire.REPLY))
    assert isinstance(event, BadReply)


@pytest.mark.parametrize(
    ("command", "data", "answer"),
    [
        (Command.DMA_READ, b"", struct.pack("=QQ", 0, 4)),
        (Command.DMA_READ, b"", struct.pack("=QQ", 0, 4) + b"abc"),
        (Command.DMA_READ, b"", struct.pack("=QQ", 0, 5) + b"abcde"),
        (Command.DMA_READ, b"", struct.pack("=QQ", 1, 4) + b"abcd"),
        (Command.DMA_READ, b"", b""),
        (Command.DMA_WRITE, b"abcd", struct.pack("=QQ", 1, 4)),
        (Command.DMA_WRITE, b"abcd", struct.pack("=QQ", 0, 5)),
        (Command.DMA_WRITE, b"abcd", struct.pack("=QI", 0, 5)),
        (Command.DMA_WRITE, b"abcd", bytes(8)),
        (Command.DMA_WRITE, b"abcd", bytes(20)),
    ],
)
def test_nonsense_from_a_client_that_was_asked_for_memory_fails_alone(
    command: Command, data: bytes, answer: bytes
) -> None:
    server = ready_server()
    message_id, _ = server.request(command, DmaAccess(0, 4), data)
    (event,) = server.receive(message(message_id, command, answer, flags=wire.REPLY))
    assert isinstance(event, BadReply)
    assert server.ready
