"""Each command once, both ways, against bytes written by hand from the spec's tables."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from protocol import (
    Command,
    Connection,
    ErrorReply,
    Reply,
    Request,
)
from protocol.messages import (
    DeviceFeature,
    DeviceInfo,
    DmaAccess,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    MigData,
    Record,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    WriteMulti,
)
from protocol.vfio import (
    DeviceFlags,
    DmaMapFlags,
    DmaUnmapFlags,
    Feature,
    FeatureFlags,
    IrqInfoFlags,
    IrqSetFlags,
    RegionFlags,
)
from tests.protocol import wire
from tests.protocol.wire import message, ready_client, ready_server


@dataclass(frozen=True)
class Exchange:
    """A command with its request and reply, as records and as the bytes of their payloads."""

    command: Command
    body: Record | None
    data: bytes
    fds: tuple[int, ...]
    request: str
    reply_body: Record | None
    reply_data: bytes
    reply: str


EXCHANGES = [
    Exchange(
        Command.DMA_MAP,
        DmaMap(32, DmaMapFlags.READ | DmaMapFlags.WRITE, 0x2000, 0x8000_0000, 0x10_0000),
        b"",
        (40,),
        "20000000 03000000 0020000000000000 0000008000000000 0000100000000000",
        None,
        b"",
        "",
    ),
    Exchange(
        Command.DMA_UNMAP,
        DmaUnmap(24, DmaUnmapFlags(0), 0x8000_0000, 0x10_0000),
        b"",
        (),
        "18000000 00000000 0000008000000000 0000100000000000",
        DmaUnmap(24, DmaUnmapFlags(0), 0x8000_0000, 0x10_0000),
        b"",
        "18000000 00000000 0000008000000000 0000100000000000",
    ),
    Exchange(
        Command.DEVICE_GET_INFO,
        DeviceInfo(16),
        b"",
        (),
        "10000000 00000000 00000000 00000000",
        DeviceInfo(16, DeviceFlags.RESET | DeviceFlags.PCI, 9, 5),
        b"",
        "10000000 03000000 09000000 05000000",
    ),
    Exchange(
        Command.DEVICE_GET_REGION_INFO,
        RegionInfo(64, index=2),
        b"",
        (),
        "40000000 00000000 02000000 00000000 0000000000000000 0000000000000000",
        RegionInfo(64, RegionFlags.READ | RegionFlags.MMAP | RegionFlags.CAPS, 2, 32, 0x10000, 0),
        bytes.fromhex("0100010000000000 0100000000000000 0010000000000000 0010000000000000"),
        "40000000 0d000000 02000000 20000000 0000010000000000 0000000000000000"
        "0100010000000000 0100000000000000 0010000000000000 0010000000000000",
    ),
    Exchange(
        Command.DEVICE_GET_IRQ_INFO,
        IrqInfo(16, index=2),
        b"",
        (),
        "10000000 00000000 02000000 00000000",
        IrqInfo(16, IrqInfoFlags.EVENTFD | IrqInfoFlags.NORESIZE, 2, 5),
        b"",
        "10000000 09000000 02000000 05000000",
    ),
    Exchange(
        Command.DEVICE_SET_IRQS,
        SetIrqs(20, IrqSetFlags.DATA_EVENTFD | IrqSetFlags.ACTION_TRIGGER, 2, 0, 3),
        b"",
        (10, 11, 12),
        "14000000 24000000 02000000 00000000 03000000",
        None,
        b"",
        "",
    ),
    Exchange(
        Command.DEVICE_SET_IRQS,
        SetIrqs(23, IrqSetFlags.DATA_BOOL | IrqSetFlags.ACTION_MASK, 2, 1, 3),
        b"\1\0\1",
        (),
        "17000000 0a000000 02000000 01000000 03000000 010001",
        None,
        b"",
        "",
    ),
    Exchange(
        Command.REGION_READ,
        RegionAccess(0x100, 7, 8),
        b"",
        (),
        "0001000000000000 07000000 08000000",
        RegionAccess(0x100, 7, 8),
        b"abcdefgh",
        "0001000000000000 07000000 08000000 6162636465666768",
    ),
    Exchange(
        Command.REGION_WRITE,
        RegionAccess(0x3000, 0, 2),
        b"\x01\x00",
        (),
        "0030000000000000 00000000 02000000 0100",
        RegionAccess(0x3000, 0, 2),
        b"",
        "0030000000000000 00000000 02000000",
    ),
    Exchange(Command.DEVICE_RESET, None, b"", (), "", None, b"", ""),
    Exchange(
        Command.DMA_UNMAP,
        DmaUnmap(48, DmaUnmapFlags.GET_DIRTY_BITMAP, 0x8000_0000, 0x4000),
        bytes.fromhex("0010000000000000 0800000000000000"),
        (),
        "30000000 01000000 0000008000000000 0040000000000000 0010000000000000 0800000000000000",
        DmaUnmap(48, DmaUnmapFlags.GET_DIRTY_BITMAP, 0x8000_0000, 0x4000),
        bytes.fromhex("0010000000000000 0800000000000000 0900000000000000"),
        "30000000 01000000 0000008000000000 0040000000000000 0010000000000000 0800000000000000"
        "0900000000000000",
    ),
    Exchange(
        Command.DEVICE_GET_REGION_IO_FDS,
        RegionIoFds(4096, index=4),
        b"",
        (),
        "00100000 00000000 04000000 00000000",
        RegionIoFds(56, 0, 4, 1),
        bytes.fromhex("0030000000000000 0200000000000000 00000000 00000000 00000000 00000000" + "00" * 8),
        "38000000 00000000 04000000 01000000"
        "0030000000000000 0200000000000000 00000000 00000000 00000000 00000000 0000000000000000",
    ),
    Exchange(
        Command.REGION_WRITE_MULTI,
        WriteMulti(1),
        bytes.fromhex("0030000000000000 04000000 02000000 0100000000000000"),
        (),
        "0100000000000000 0030000000000000 04000000 02000000 0100000000000000",
        WriteMulti(1),
        b"",
        "0100000000000000",
    ),
    Exchange(
        Command.DEVICE_FEATURE,
        DeviceFeature(16, FeatureFlags.GET | Feature.MIGRATION),
        b"",
        (),
        "10000000 01000100",
        DeviceFeature(16, FeatureFlags.GET | Feature.MIGRATION),
        b"\5" + bytes(7),
        "10000000 01000100 0500000000000000",
    ),
    Exchange(
        Command.DEVICE_FEATURE,
        DeviceFeature(16, FeatureFlags.SET | Feature.MIG_DEVICE_STATE),
        b"\3" + bytes(7),
        (),
        "10000000 02000200 03000000 00000000",
        DeviceFeature(16, FeatureFlags.SET | Feature.MIG_DEVICE_STATE),
        b"\3" + bytes(7),
        "10000000 02000200 03000000 00000000",
    ),
    Exchange(
        Command.DEVICE_FEATURE,
        DeviceFeature(40, FeatureFlags.GET | Feature.DMA_LOGGING_REPORT),
        bytes.fromhex("0000008000000000 0040000000000000 0010000000000000"),
        (),
        "28000000 08000100 0000008000000000 0040000000000000 0010000000000000",
        DeviceFeature(40, FeatureFlags.GET | Feature.DMA_LOGGING_REPORT),
        bytes.fromhex("0000008000000000 0040000000000000 0010000000000000 0f00000000000000"),
        "28000000 08000100 0000008000000000 0040000000000000 0010000000000000 0f00000000000000",
    ),
    Exchange(
        Command.DEVICE_FEATURE,
        DeviceFeature(8, FeatureFlags.PROBE | FeatureFlags.SET | Feature.DMA_LOGGING_START),
        b"",
        (),
        "08000000 06000600",
        DeviceFeature(8, FeatureFlags.PROBE | FeatureFlags.SET | Feature.DMA_LOGGING_START),
        b"",
        "08000000 06000600",
    ),
    Exchange(
        Command.MIG_DATA_READ,
        MigData(24, 16),
        b"",
        (),
        "18000000 10000000",
        MigData(13, 5),
        b"state",
        "0d000000 05000000 7374617465",
    ),
    Exchange(
        Command.MIG_DATA_WRITE,
        MigData(13, 5),
        b"state",
        (),
        "0d000000 05000000 7374617465",
        None,
        b"",
        "",
    ),
]
FROM_THE_SERVER = [
    Exchange(
        Command.DMA_READ,
        DmaAccess(0x8000_1000, 5),
        b"",
        (),
        "0010008000000000 0500000000000000",
        DmaAccess(0x8000_1000, 5),
        b"bytes",
        "0010008000000000 0500000000000000 6279746573",
    ),
    Exchange(
        Command.DMA_WRITE,
        DmaAccess(0x8000_1000, 5),
        b"bytes",
        (),
        "0010008000000000 0500000000000000 6279746573",
        DmaAccess(0x8000_1000, 5),
        b"",
        "0010008000000000 0500000000000000",
    ),
]
EACH = pytest.mark.parametrize(
    "exchange", EXCHANGES + FROM_THE_SERVER, ids=lambda exchange: exchange.command.name
)


def ready_to_ask(exchange: Exchange) -> Connection:
    """The end that asks this, for which the other one speaks everything that it can be asked for."""
    if exchange in FROM_THE_SERVER:
        return ready_server()
    return ready_client(b'{"capabilities":{"max_msg_fds":8,"write_multiple":true}}\0')


def ready_to_answer(exchange: Exchange) -> Connection:
    if exchange in FROM_THE_SERVER:
        return ready_client()
    return ready_server(b'{"capabilities":{"max_msg_fds":16,"write_multiple":true}}\0')


@EACH
def test_a_request_is_understood_and_answered(exchange: Exchange) -> None:
    answering = ready_to_answer(exchange)
    sent = message(0xBEEF, exchange.command, bytes.fromhex(exchange.request))
    (request,) = answering.receive(sent, exchange.fds)
    assert request == Request(exchange.command, 0xBEEF, False, exchange.body, exchange.data, exchange.fds)
    answered = answering.reply(request, exchange.reply_body, exchange.reply_data)
    assert answered == message(0xBEEF, exchange.command, bytes.fromhex(exchange.reply), flags=wire.REPLY)


@EACH
def test_a_request_is_sent_and_the_answer_understood(exchange: Exchange) -> None:
    asking = ready_to_ask(exchange)
    message_id, sent = asking.request(exchange.command, exchange.body, exchange.data, exchange.fds)
    assert sent == message(message_id, exchange.command, bytes.fromhex(exchange.request))
    answer = message(message_id, exchange.command, bytes.fromhex(exchange.reply), flags=wire.REPLY)
    (reply,) = asking.receive(answer)
    assert reply == Reply(exchange.command, message_id, exchange.reply_body, exchange.reply_data)
    assert asking.outstanding == 0


@EACH
def test_a_refusal_is_a_header_with_an_errno(exchange: Exchange) -> None:
    answering = ready_to_answer(exchange)
    sent = message(5, exchange.command, bytes.fromhex(exchange.request))
    (request,) = answering.receive(sent, exchange.fds)
    assert isinstance(request, Request)
    refusal = message(5, exchange.command, flags=wire.REPLY | wire.ERROR, error=17)
    assert answering.error(request, 17) == refusal
    asking = ready_to_ask(exchange)
    message_id, _ = asking.request(exchange.command, exchange.body, exchange.data, exchange.fds)
    (answer,) = asking.receive(message(message_id, exchange.command, flags=wire.REPLY | wire.ERROR, error=17))
    assert answer == ErrorReply(exchange.command, message_id, 17)


def test_every_command_has_an_exchange() -> None:
    shown = {exchange.command for exchange in EXCHANGES + FROM_THE_SERVER}
    assert shown == set(Command) - {Command.VERSION}
