"""Reading a capture file, pcap or pcapng, with the suspicion that files from elsewhere deserve."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import dpkt

LONGEST = 65535 + 18            # the largest IP packet behind an Ethernet header with a VLAN tag
SHORTEST = 14                   # an Ethernet header and nothing behind it
ETHERNET = 1                    # the only link type (DLT_EN10MB) that fits a network card

# What dpkt raises for bytes that are no capture, and the operating system for a file that cannot be read.
_DAMAGE = (
    ValueError,
    OSError,
    dpkt.Error,
    struct.error,
    ArithmeticError,
    AttributeError,
    IndexError,
    MemoryError,
)


class CaptureError(Exception):
    """The file cannot be replayed from here on; the text is one line that says why."""


class _Whole:
    """Reads of `file` give all that was asked for, or nothing at its end; ValueError where it breaks off.

    So neither a record that is cut short nor a length that nobody wrote in earnest gets any further.
    """

    name = "capture"

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def read(self, count: int) -> bytes:
        left = self._size - self._file.tell()
        if left and not 0 <= count <= left:
            raise ValueError(f"the file breaks off: {count} bytes are announced, {left} are left")
        data = self._file.read(max(count, 0))
        if len(data) != count and left:
            raise ValueError("the file has shrunk")
        return data

    def seek(self, offset: int) -> None:
        self._file.seek(offset)


def frames(file: BinaryIO) -> Iterator[tuple[float, bytes]]:
    """The frames of a capture from its beginning, with their times in seconds; raises CaptureError."""
    count = 0
    try:
        file.seek(0)
        reader = dpkt.pcap.UniversalReader(_Whole(file))
        if reader.datalink() != ETHERNET:
            raise CaptureError(f"its link type is {reader.datalink()}, the card needs Ethernet ({ETHERNET})")
        for stamp, data in reader:
            if not SHORTEST <= len(data) <= LONGEST:
                raise CaptureError(
                    f"frame {count + 1} has {len(data)} bytes; a frame has {SHORTEST} to {LONGEST}"
                )
            yield float(stamp), bytes(data)
            count += 1
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CaptureError(f"it is damaged or no capture at all: after {count} frames: {reason}") from None
