"""The bytes in which a card travels.

     0            8         10     12         16                        tag      length
    +------------+---------+------+----------+-----------------------+ +--------+--------+---------+
    | "TRIONIC\\0" | version | zero | length   | identity, `length` .. | | 4 bytes| 4 bytes| payload | ..
    +------------+---------+------+----------+-----------------------+ +--------+--------+---------+

Numbers are little-endian. The identity says which cards can take the rest, as text: a line `name=value` a
trait, equal in source and destination, so the first bytes decide. Sections follow; the one tagged `END` is
the last, its payload a BLAKE2b digest of everything before that payload.
"""

import errno
import struct
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import zip_longest

from device.errors import DeviceError

MAGIC = b"TRIONIC\0"
VERSION = 1
END = b"END\0"

# What is not known to be needed is not read, let alone kept: a destination has no reason to trust its source.
MAX_IDENTITY = 4096  # bytes; the card's own is about 300
MAX_PAYLOAD = 16 << 20  # bytes of a section: the largest is a full loopback, 4 MiB

DIGEST_SIZE = 16

_START = struct.Struct("<8sHHI")
_SECTION = struct.Struct("<4sI")

Section = tuple[bytes, bytes]  # tag, payload


def refuse(why: str) -> DeviceError:
    """The EINVAL that a stream is refused with."""
    return DeviceError(errno.EINVAL, f"migration data refused: {why}")


def encode_identity(traits: Mapping[str, str]) -> bytes:
    """The traits as the first bytes carry them; ValueError if they are too long or have line ends."""
    if any("\n" in name + value for name, value in traits.items()):
        raise ValueError("a trait is one line")
    encoded = "".join(f"{name}={value}\n" for name, value in traits.items()).encode()
    if len(encoded) > MAX_IDENTITY:
        raise ValueError(f"an identity has at most {MAX_IDENTITY} bytes, not {len(encoded)}")
    return encoded


class StreamWriter:
    """Takes sections, gives bytes."""

    def __init__(self, identity: bytes) -> None:
        self._digest = blake2b(digest_size=DIGEST_SIZE)
        self._bytes = bytearray()
        self._add(_START.pack(MAGIC, VERSION, 0, len(identity)) + identity)

    def _add(self, data: bytes) -> None:
        self._digest.update(data)
        self._bytes += data

    @property
    def waiting(self) -> int:
        """Bytes that can be taken now."""
        return len(self._bytes)

    def section(self, tag: bytes, payload: bytes) -> None:
        """Add a section; ValueError if its payload exceeds MAX_PAYLOAD."""
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"section {tag!r}: {len(payload)} bytes of at most {MAX_PAYLOAD}")
        self._add(_SECTION.pack(tag, len(payload)))
        self._add(payload)

    def finish(self) -> None:
        """Add the end mark."""
        self._add(_SECTION.pack(END, DIGEST_SIZE))
        self._bytes += self._digest.digest()

    def take(self, size: int) -> bytes:
        """At most `size` bytes, the next in order."""
        taken = bytes(self._bytes[:size])
        del self._bytes[:size]
        return taken


class StreamReader:
    """Takes bytes, in pieces of any size, gives sections.

    `sizes` has the tags that may come and the greatest payload of each, `limit` bounds the whole stream in
    bytes. What does not hold is refused with DeviceError(EINVAL), the identity as soon as its last byte is
    there and a section as soon as its tag and length are; a reader that refused once refuses everything.
    """

    def __init__(self, identity: bytes, sizes: Mapping[bytes, int], limit: int) -> None:
        self._identity = identity
        self._sizes = {**sizes, END: DIGEST_SIZE}
        self._left = limit
        self._digest = blake2b(digest_size=DIGEST_SIZE)
        self._bytes = bytearray()
        self._compatible = False
        self._refused: str | None = None
        self.complete = False

    def feed(self, data: bytes | bytearray | memoryview) -> list[Section]:
        """The sections that `data` completes, without the end mark."""
        if self._refused:
            raise DeviceError(errno.EINVAL, self._refused)
        try:
            self._left -= len(data)
            if self._left < 0:
                raise refuse("more bytes than this card's state can have")
            self._bytes += data
            if not self._compatible:
                self._compatible = self._start()
            return list(self._sections()) if self._compatible else []
        except DeviceError as error:
            self._refused = error.strerror  # not the exception, whose traceback holds what came
            self._bytes.clear()
            raise

    def _start(self) -> bool:
        """Whether the identity has come, and been found to be ours."""
        have = bytes(self._bytes[: len(MAGIC)])
        if not MAGIC.startswith(have):
            raise refuse("it is none of a trionic card")
        if len(self._bytes) < _START.size:
            return False
        _, version, zero, length = _START.unpack_from(self._bytes)
        if version != VERSION or zero:
            raise refuse(f"format {version}, this card reads {VERSION}")
        if length > MAX_IDENTITY:
            raise refuse(f"an identity of {length} bytes")
        if len(self._bytes) < _START.size + length:
            return False
        theirs = bytes(self._bytes[_START.size : _START.size + length])
        if theirs != self._identity:
            raise refuse(f"the cards differ: {_difference(theirs, self._identity)}")
        self._consume(_START.size + length)
        return True

    def _sections(self) -> Iterator[Section]:
        while len(self._bytes) >= _SECTION.size and not self.complete:
            tag, length = _SECTION.unpack_from(self._bytes)
            if length > self._sizes.get(tag, -1):
                raise refuse(f"section {tag!r} of {length} bytes")
            end = _SECTION.size + length
            if len(self._bytes) < end:
                return
            payload = bytes(self._bytes[_SECTION.size : end])
            if tag != END:
                self._consume(end)
                yield tag, payload
                continue
            self._consume(_SECTION.size)
            if payload != self._digest.digest():
                raise refuse("its digest is another one")
            del self._bytes[:length]
            self.complete = True
        if self.complete and self._bytes:
            raise refuse("bytes after the end mark")

    def _consume(self, size: int) -> None:
        self._digest.update(self._bytes[:size])
        del self._bytes[:size]


def _difference(theirs: bytes, ours: bytes) -> str:
    """The first line in which two identities differ, for a person who has to find the option to change."""
    lines = [text.decode("ascii", "backslashreplace").splitlines() for text in (theirs, ours)]
    for one, other in zip_longest(*lines, fillvalue="nothing"):
        if one != other:
            return f"the source has {one[:80]!r}, this card {other[:80]!r}"
    return "in their line ends"
