"""Requests as a client could send them: near to right ones, because nonsense gets no further than the first
check.

Layouts are the specification's, written out here once more.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from fuzz._choices import PAGE, Choices
from fuzz._zoo import MEMORY_PAGES, Zoo
from tests.server.raw import (
    DMA_MAP,
    DMA_READ,
    DMA_UNMAP,
    DMA_WRITE,
    ERROR,
    EVENTFD,
    GET_INFO,
    GET_IO_FDS,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    RESET,
    SET_IRQS,
    VERSION,
    access,
    irqs,
    message,
)

WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE = range(15, 19)

HEADER_SIZE: Final = 16

LIVE_MIGRATION_BAR: Final = 4
BLOCK: Final = 0x80
"""Bytes at its start with all that there is."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What one sendmsg carries."""

    data: bytes
    fds: tuple[int, ...] = ()


def _address(choices: Choices) -> int:
    if choices.often():
        return PAGE * choices.below(2 * MEMORY_PAGES)
    return choices.number(64)


def _size(choices: Choices) -> int:
    if choices.often():
        return PAGE * choices.below(MEMORY_PAGES)
    return choices.number(64)


def _argsz(choices: Choices, size: int) -> int:
    return size if choices.often() else choices.number(32)


def _register(choices: Choices) -> tuple[int, int]:
    """(region, offset): mostly where something is."""
    region = choices.below(9)
    if choices.seldom():
        return choices.number(32), choices.number(64)
    if region == 0:
        block = choices.pick((0x0, 0x0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000))
        return region, block + choices.below(0x48)
    offset = choices.below(PAGE)
    return region, offset % BLOCK if region == LIVE_MIGRATION_BAR else offset


def _dma_map(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    flags = choices.pick((3, 3, 3, 1, 2, 0, 4, 7, 1 << 31))
    offset = 0 if choices.often() else choices.number(64)
    payload = struct.pack("=IIQQQ", _argsz(choices, 32), flags, offset, _address(choices), _size(choices))
    return payload, zoo.some(choices, "memory", choices.pick((1, 1, 1, 0, 2)))


def _dma_unmap(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    flags = choices.pick((0, 0, 0, 1, 2, 3, 4))
    bitmap = b""
    argsz = 24
    if flags & 1 and choices.often():
        bitmap = struct.pack("=QQ", choices.number(64), choices.number(64))
        argsz = 40 + choices.below(64)
    everything = flags & 2 and choices.often()
    address, size = (0, 0) if everything else (_address(choices), _size(choices))
    return struct.pack("=IIQQ", _argsz(choices, argsz), flags, address, size) + bitmap, []


def _small_info(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    return struct.pack("=IIII", _argsz(choices, 16), choices.below(2), choices.below(10), 0), []


def _io_fds(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    argsz = _argsz(choices, 16 + 40 * choices.below(8))
    return struct.pack("=IIII", argsz, choices.below(2), choices.below(10), choices.below(3)), []


def _region_info(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    argsz = _argsz(choices, 32 + choices.below(80))
    return struct.pack("=IIIIQQ", argsz, 0, choices.below(10), 0, 0, 0), []


def _set_irqs(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    data = choices.pick((1, 2, EVENTFD, EVENTFD)) if choices.often() else choices.below(8)
    action = choices.pick((8, 16, 32, 32)) if choices.often() else choices.below(256)
    count = choices.below(6) if choices.often() else choices.number(32)
    start = 0 if choices.often() else choices.number(32)
    booleans = choices.bytes(min(count, 8)).ljust(min(count, 4096), b"\1") if data == 2 else b""
    payload = irqs(data | action, choices.below(6), start, count, booleans)
    fds = zoo.some(choices, "event", min(count, 20)) if data == EVENTFD and choices.often() else []
    return payload, fds


def _region_read(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    region, offset = _register(choices)
    count = choices.pick((1, 2, 4, 8, 64)) if choices.often() else choices.number(32)
    return access(offset, region, count), []


def _region_write(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    region, offset = _register(choices)
    count = choices.pick((1, 2, 4, 8, 64)) if choices.often() else choices.below(70000)
    content = choices.bytes(min(count, 8)).ljust(count, b"\x5a")
    return access(offset, region, count if choices.often() else choices.number(32)) + content, []


def _write_multi(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    count = choices.below(5) if choices.often() else choices.below(260)
    entries = b""
    for _ in range(count):
        region, offset = _register(choices)
        length = choices.pick((1, 2, 4, 8, 1, 2, 4, 0, 9)) if choices.often() else choices.number(32)
        entries += struct.pack("=QII8s", offset, region, length, choices.bytes(8))
    return struct.pack("=Q", count if choices.often() else choices.number(64)) + entries, []


def _feature(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    feature = choices.pick((1, 2, 2, 11, 6, 7, 8)) if choices.often() else choices.below(1 << 16)
    way = choices.pick((1, 2, 4, 5, 6)) if choices.often() else choices.below(1 << 16)
    match feature:
        case 2:
            data = struct.pack("=II", choices.below(9), choices.number(32))
        case 6:
            ranges = choices.below(4) if choices.often() else choices.below(300)
            data = struct.pack("=QII", choices.pick((PAGE, 0, 1, 2 * PAGE, 1 << 63)), ranges, 0)
            data += b"".join(struct.pack("=QQ", _address(choices), _size(choices)) for _ in range(ranges))
        case 8:
            data = struct.pack("=QQQ", _address(choices), _size(choices), choices.pick((PAGE, 0, 1, 1 << 63)))
        case 11:
            bar = choices.pick((2, 4, 0, 1, 6, 7, 1 << 31))
            ranges = choices.below(4) if choices.often() else choices.below(300)
            said = ranges if choices.often() else choices.number(32)
            data = struct.pack("=IIII", bar, choices.number(32), choices.seldom(), said)
            data += b"".join(struct.pack("=QQ", _address(choices), _size(choices)) for _ in range(ranges))
        case _:
            data = choices.bytes(choices.below(24))
    argsz = _argsz(choices, 8 + len(data) + choices.below(32))
    return struct.pack("=II", argsz, feature | way << 16) + data, []


def _mig_read(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    size = choices.below(70000) if choices.often() else choices.number(32)
    return struct.pack("=II", _argsz(choices, 8 + size & 0xFFFFFFFF), size), []


def _mig_write(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    content = choices.bytes(choices.below(64))
    size = len(content) if choices.often() else choices.number(32)
    return struct.pack("=II", _argsz(choices, 8 + len(content)), size) + content, []


def _dma_access(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    return struct.pack("=QQ", _address(choices), _size(choices)), []


def _nothing(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    return b"", []


def _version(choices: Choices, zoo: Zoo) -> tuple[bytes, list[int]]:
    return struct.pack("=HH", *_numbers_of_version(choices)) + _capabilities(choices), []


_PAYLOADS: Final[dict[int, Callable[[Choices, Zoo], tuple[bytes, list[int]]]]] = {
    REGION_READ: _region_read,
    REGION_WRITE: _region_write,
    DMA_MAP: _dma_map,
    DMA_UNMAP: _dma_unmap,
    SET_IRQS: _set_irqs,
    GET_INFO: _small_info,
    GET_REGION_INFO: _region_info,
    GET_IO_FDS: _io_fds,
    GET_IRQ_INFO: _small_info,
    RESET: _nothing,
    WRITE_MULTI: _write_multi,
    FEATURE: _feature,
    MIG_READ: _mig_read,
    MIG_WRITE: _mig_write,
    DMA_READ: _dma_access,
    DMA_WRITE: _dma_access,
    VERSION: _version,
    0: _nothing,
    14: _nothing,
    19: _nothing,
    0xFFFF: _nothing,
}
_COMMANDS: Final = (*(_PAYLOADS.keys()), REGION_WRITE, DMA_MAP, SET_IRQS, FEATURE)


def request(choices: Choices, zoo: Zoo, *, framed: bool = True) -> Sent:
    """A request; `framed`: its header is sound, so that it must be answered."""
    command = choices.pick(_COMMANDS)
    payload, fds = _PAYLOADS[command](choices, zoo)
    if choices.seldom():
        payload = _spoilt(choices, payload)
    if choices.seldom():
        fds = zoo.some(choices, "event", choices.pick((1, 2, 8, 16)))
    flags = choices.pick((0, 0, 0, 0, 0, 0, NO_REPLY, ERROR, NO_REPLY | ERROR))
    data = message(command, payload, message_id=choices.below(1 << 16), flags=flags)
    if not framed:
        data = _misframed(choices, data)
        fds += zoo.some(choices, "event", choices.pick((0, 0, 17, 30)))
    return Sent(data, tuple(fds))


def _spoilt(choices: Choices, payload: bytes) -> bytes:
    match choices.below(3):
        case 0:
            return payload[: choices.below(len(payload) + 1)]
        case 1:
            return payload + choices.bytes(8)
        case _:
            spoilt = bytearray(payload)
            if spoilt:
                spoilt[choices.below(len(spoilt))] ^= 1 << choices.below(8)
            return bytes(spoilt)


def _misframed(choices: Choices, data: bytes) -> bytes:
    header = list(struct.unpack_from("=HHIII", data))
    match choices.below(4):
        case 0:
            header[2] = choices.number(32)
        case 1:
            header[3] = choices.number(32)
        case 2:
            header[3] |= REPLY
        case _:
            header[4] = choices.number(32)
    return struct.pack("=HHIII", *header) + data[HEADER_SIZE:]


def _numbers_of_version(choices: Choices) -> tuple[int, int]:
    return (0, choices.below(4)) if choices.often() else (choices.number(16), choices.number(16))


def proposal(choices: Choices) -> bytes:
    """A client's VERSION, mostly one that can be agreed on."""
    payload = struct.pack("=HH", *_numbers_of_version(choices)) + _capabilities(choices)
    return message(VERSION, payload, message_id=choices.below(1 << 16))


def _capabilities(choices: Choices) -> bytes:
    if choices.seldom():
        return choices.bytes(choices.below(64))
    said: dict[str, Any] = {}
    if choices.often():
        said["max_msg_fds"] = choices.pick((16, 16, 8, 1, 0, 1 << 40))
    if choices.often():
        said["max_data_xfer_size"] = choices.pick((1 << 20, 1 << 20, 4096, 1, 0, 1 << 63))
    if choices.often():
        said["write_multiple"] = True
    if choices.byte() & 1:
        said["twin_socket"] = {"supported": True}
    if choices.seldom():
        said["pgsizes"] = choices.number(64)
        said["max_dma_maps"] = choices.number(32)
        said["migration"] = {"pgsize": choices.number(64)}
    if choices.seldom():
        said[choices.pick(("max_msg_fds", "twin_socket", "migration", "pgsizes", "unknown"))] = choices.pick(
            (None, -1, 1.5, "1", [], {}, True, 1 << 64)
        )
    return json.dumps({"capabilities": said}).encode() + b"\0"
