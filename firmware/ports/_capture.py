"""Capture files: pcap is written, it and pcapng are read (draft-ietf-opsawg-pcap and -pcapng).

dpkt writes records and knows the magic numbers and pcapng's options. The loops that read are our own,
because dpkt's readers take the end of a file within a frame for a shorter frame, do not tell of frames that
the capture has cut, and hold every interface of a pcapng file for its first one.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import BinaryIO

import dpkt

from firmware.ports._port import MAX_FRAME, MIN_FRAME

__all__ = ["CaptureError", "CaptureWriter", "read_frames"]

ETHERNET = 1  # LINKTYPE_ETHERNET, the only link type that fits the card
SNAP_LENGTH = 262144  # what libpcap calls unlimited (MAXIMUM_SNAPLEN); no frame of a card is longer
MAX_BLOCK = 16 << 20  # bytes of a pcapng block, as Wireshark has it; a longer one is damage
MAX_OPTIONS = 64 << 10  # bytes of options in a block that is decoded
GZIP_MAGIC = b"\x1f\x8b"

_NANOSECONDS = frozenset({dpkt.pcap.TCPDUMP_MAGIC_NANO, dpkt.pcap.PMUDPCT_MAGIC_NANO})
_LITTLE = frozenset({dpkt.pcap.PMUDPCT_MAGIC, dpkt.pcap.PMUDPCT_MAGIC_NANO, dpkt.pcap.PACPDOM_MAGIC})


class CaptureError(ValueError):
    """Why a file cannot be replayed."""


class CaptureWriter:
    """A pcap file, begun anew on the descriptor `fd`, which it owns.

    The file ends with a whole frame after each call, failed ones included. Making one and `write` raise
    OSError; a descriptor that no writer could be made for stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._end = 0
        self._buffer = io.BytesIO()
        if self._regular:
            os.ftruncate(fd, 0)
        self._writer = dpkt.pcap.Writer(self._buffer, snaplen=SNAP_LENGTH, linktype=ETHERNET)
        self._flush()

    def write(self, frames: Iterable[tuple[int, bytes]]) -> None:
        """Add frames behind their times in ns since 1970; the file takes whole microseconds."""
        for moment, frame in frames:
            # A float is off by a microsecond now and then, and dpkt rounds some up to a whole second of them.
            self._writer.writepkt_time(frame, Decimal(moment // 1000).scaleb(-6))
        self._flush()

    def _flush(self) -> None:
        data = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            if self._regular:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
                    os.lseek(self._fd, self._end, os.SEEK_SET)
            raise
        self._end += written

    def close(self) -> None:
        """Close the file. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_frames(file: BinaryIO) -> Iterator[tuple[float, bytes]]:
    """Every frame of a file from its beginning, behind its time stamp in seconds since 1970.

    Raises CaptureError at the first that no card can receive, or that is not all there.
    """
    file.seek(0)
    magic = file.read(4)
    file.seek(0)
    number = int.from_bytes(magic, "big")
    if len(magic) == 4 and number == dpkt.pcapng.PCAPNG_BT_SHB:
        records = _read_pcapng(file)
    elif len(magic) == 4 and number in dpkt.pcap.MAGIC_TO_PKT_HDR:
        records = _read_pcap(file, number)
    elif magic.startswith(GZIP_MAGIC):
        raise CaptureError("it is compressed; gunzip it first")
    else:
        raise CaptureError("it is neither a pcap nor a pcapng file")
    for count, (stamp, length, frame) in enumerate(records, 1):
        if length > len(frame):
            raise CaptureError(
                f"frame {count} was cut from {length} to {len(frame)} bytes by its capture;"
                " capture whole frames"
            )
        if not MIN_FRAME <= len(frame) <= MAX_FRAME:
            raise CaptureError(
                f"frame {count} has {len(frame)} bytes; a card's has {MIN_FRAME} to {MAX_FRAME}"
            )
        yield stamp, frame


def _exactly(file: BinaryIO, count: int, what: str) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise CaptureError(f"it ends within {what}")
    return data


def _check_link(link_type: int) -> None:
    if link_type != ETHERNET:
        raise CaptureError(
            f"its frames are of link type {link_type}, not Ethernet ({ETHERNET});"
            " capture on an Ethernet interface"
        )


def _read_pcap(file: BinaryIO, magic: int) -> Iterator[tuple[float, int, bytes]]:
    order = "<" if magic in _LITTLE else ">"
    header = _exactly(file, 24, "its header")
    major, minor = struct.unpack_from(order + "HH", header, 4)
    if major != dpkt.pcap.PCAP_VERSION_MAJOR:
        raise CaptureError(f"it is of version {major}.{minor} of pcap; 2.4 is known")
    # The upper half of this field tells of frame check sequences.
    _check_link(struct.unpack_from(order + "I", header, 20)[0] & 0xFFFF)
    tick = 1e-9 if magic in _NANOSECONDS else 1e-6
    record = struct.Struct(order + "IIII")
    size = dpkt.pcap.MAGIC_TO_PKT_HDR[magic].__hdr_len__
    count = 0
    while head := file.read(size):
        count += 1
        if len(head) < size:
            raise CaptureError(f"it ends within the header of frame {count}")
        seconds, ticks, captured, length = record.unpack_from(head)
        if captured > MAX_FRAME:
            raise CaptureError(f"frame {count} has {captured} bytes; a card's has at most {MAX_FRAME}")
        yield seconds + ticks * tick, length, _exactly(file, captured, f"frame {count}")


@dataclass(frozen=True, slots=True)
class _Interface:
    tick: Fraction  # seconds
    offset: int  # seconds
    snap_length: int


def _read_pcapng(file: BinaryIO) -> Iterator[tuple[float, int, bytes]]:
    order = "<"
    interfaces: list[_Interface] = []
    stamp = 0.0
    count = 0
    while head := file.read(8):
        count += 1
        name = f"block {count}"
        if len(head) < 8:
            raise CaptureError(f"it ends within {name}")
        if int.from_bytes(head[:4], "big") == dpkt.pcapng.PCAPNG_BT_SHB:
            head += _exactly(file, 4, name)
            order = _byte_order(head[8:])
            interfaces = []
        kind, length = struct.unpack_from(order + "II", head)
        if not len(head) + 4 <= length <= MAX_BLOCK or length % 4:
            raise CaptureError(f"{name} is said to have {length} bytes, which no block has")
        block = head + _exactly(file, length - len(head), name)
        if struct.unpack_from(order + "I", block, length - 4)[0] != length:
            raise CaptureError(f"the two lengths of {name} differ")
        try:
            if kind == dpkt.pcapng.PCAPNG_BT_SHB:
                major, minor = struct.unpack_from(order + "HH", block, 12)
                if major != dpkt.pcapng.PCAPNG_VERSION_MAJOR:
                    raise CaptureError(f"it is of version {major}.{minor} of pcapng; 1.0 is known")
            elif kind == dpkt.pcapng.PCAPNG_BT_IDB:
                interfaces.append(_interface(block, order))
            elif kind in (dpkt.pcapng.PCAPNG_BT_EPB, dpkt.pcapng.PCAPNG_BT_PB):
                width = "I" if kind == dpkt.pcapng.PCAPNG_BT_EPB else "H"
                (number,) = struct.unpack_from(order + width, block, 8)
                high, low, captured, original = struct.unpack_from(order + "IIII", block, 12)
                stamp = float((high << 32 | low) * interfaces[number].tick + interfaces[number].offset)
                yield stamp, original, _data(block, 28, captured)
            elif kind == dpkt.pcapng.PCAPNG_BT_SPB:  # has no time stamp: it follows the frame before at once
                (original,) = struct.unpack_from(order + "I", block, 8)
                yield stamp, original, _data(block, 12, min(original, interfaces[0].snap_length or original))
        except IndexError:
            raise CaptureError(f"{name} is of an interface that is not described") from None
        except (struct.error, dpkt.dpkt.Error, UnicodeDecodeError):
            raise CaptureError(f"{name} is damaged") from None


def _byte_order(mark: bytes) -> str:
    match int.from_bytes(mark, "little"):
        case dpkt.pcapng.BYTE_ORDER_MAGIC:
            return "<"
        case dpkt.pcapng.BYTE_ORDER_MAGIC_LE:
            return ">"
    raise CaptureError("a section header has no byte-order mark")


def _data(block: bytes, begin: int, length: int) -> bytes:
    if length > len(block) - begin - 4:
        raise struct.error
    return block[begin : begin + length]


def _interface(block: bytes, order: str) -> _Interface:
    if len(block) > MAX_OPTIONS:
        raise struct.error
    description = (
        dpkt.pcapng.InterfaceDescriptionBlockLE if order == "<" else dpkt.pcapng.InterfaceDescriptionBlock
    )(block)
    _check_link(description.linktype)
    tick, offset = Fraction(1, 1_000_000), 0
    for option in description.opts:
        if option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSRESOL:
            (exponent,) = struct.unpack("B", option.data)
            tick = Fraction(1, (2 if exponent & 0x80 else 10) ** (exponent & 0x7F))
        elif option.code == dpkt.pcapng.PCAPNG_OPT_IF_TSOFFSET:
            (offset,) = struct.unpack(order + "q", option.data)
    return _Interface(tick, offset, description.snaplen)
