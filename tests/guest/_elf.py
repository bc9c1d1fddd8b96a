"""Which shared objects a program asks for, read from the program itself: it may be another processor's."""

from __future__ import annotations

import struct
from pathlib import Path

from tests.guest._errors import RigError

# The System V ABI, "Object Files" and "Program Loading and Dynamic Linking"; 64 bits, little-endian.
_IDENT = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16s2HI3QI6H")
_SEGMENT = struct.Struct("<2I6Q")
_ENTRY = struct.Struct("<qQ")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed_libraries(program: Path) -> list[str]:
    """The names of the shared objects that a program or library asks for itself, in its order.

    A static program asks for none. Raises `RigError` for anything but a 64-bit little-endian ELF file.
    """
    image = program.read_bytes()
    if not image.startswith(_IDENT):
        raise RigError(f"{program} is no 64-bit little-endian ELF file")
    try:
        return _needed(image)
    except (struct.error, ValueError, OverflowError) as broken:
        raise RigError(f"{program} is a broken ELF file: {broken}") from broken


def _needed(image: bytes) -> list[str]:
    header = _HEADER.unpack_from(image)
    table, size, count = header[5], header[9], header[10]
    segments = [_SEGMENT.unpack_from(image, table + n * size) for n in range(count)]
    names: list[int] = []
    strings: int | None = None
    for kind, _, offset, _, _, length, *_ in segments:
        if kind != _PT_DYNAMIC:
            continue
        for tag, value in _ENTRY.iter_unpack(image[offset : offset + length]):
            if tag == _DT_NULL:
                break
            if tag == _DT_NEEDED:
                names.append(value)
            elif tag == _DT_STRTAB:
                strings = _file_offset(segments, value)
    if not names:
        return []
    if strings is None:
        raise ValueError("it has no table of strings")
    return [image[strings + name : image.index(b"\0", strings + name)].decode() for name in names]


def _file_offset(segments: list[tuple[int, ...]], address: int) -> int:
    for kind, _, offset, start, _, length, *_ in segments:
        if kind == _PT_LOAD and start <= address < start + length:
            return offset + address - start
    raise ValueError(f"nothing of it is loaded to {address:#x}")
