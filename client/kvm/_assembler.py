"""The few instructions of real mode that our guests are made of, one function each (Intel SDM volume 2).

Operands are of 16 bits unless the name says otherwise; 0x66 before an instruction makes them 32 bits.
Addresses are offsets in segment DS, or ES where the name says so.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

CLI: Final = b"\xfa"
"""Interrupts off."""
STI: Final = b"\xfb"
"""Interrupts on, from after the next instruction."""
HLT: Final = b"\xf4"
"""Sleep until an interrupt was handled."""
NOP: Final = b"\x90"
IRET: Final = b"\xcf"
"""Return from an interrupt."""
CPUID: Final = b"\x0f\xa2"
WRMSR: Final = b"\x0f\x30"
"""Model-specific register ECX becomes EDX:EAX."""
SPIN: Final = b"\xeb\xfe"
"""Jump to itself."""

PUSH_EAX: Final = b"\x66\x50"
PUSH_ECX: Final = b"\x66\x51"
PUSH_EDX: Final = b"\x66\x52"
PUSH_ES: Final = b"\x06"
POP_EAX: Final = b"\x66\x58"
POP_ECX: Final = b"\x66\x59"
POP_EDX: Final = b"\x66\x5a"
POP_ES: Final = b"\x07"

TEST_AL: Final = b"\x84\xc0"
"""The zero flag says whether AL is 0."""


def mov_al(value: int) -> bytes:
    """AL becomes a number of 8 bits."""
    return b"\xb0" + struct.pack("<B", value)


def mov_eax(value: int) -> bytes:
    """EAX becomes a number of 32 bits."""
    return b"\x66\xb8" + struct.pack("<I", value)


def mov_ecx(value: int) -> bytes:
    """ECX becomes a number of 32 bits."""
    return b"\x66\xb9" + struct.pack("<I", value)


def mov_edx(value: int) -> bytes:
    """EDX becomes a number of 32 bits."""
    return b"\x66\xba" + struct.pack("<I", value)


def mov_es(segment: int) -> bytes:
    """ES becomes a segment, through AX."""
    return b"\xb8" + struct.pack("<H", segment) + b"\x8e\xc0"


def load_al_es(offset: int) -> bytes:
    """AL becomes the byte at ES:offset."""
    return b"\x26\xa0" + struct.pack("<H", offset)


def store_al_es(offset: int) -> bytes:
    """The byte at ES:offset becomes AL."""
    return b"\x26\xa2" + struct.pack("<H", offset)


def load_eax(address: int) -> bytes:
    """EAX becomes the 32 bits at an address."""
    return b"\x66\xa1" + struct.pack("<H", address)


def store_eax(address: int) -> bytes:
    """The 32 bits at an address become EAX."""
    return b"\x66\xa3" + struct.pack("<H", address)


def store_ebx(address: int) -> bytes:
    """The 32 bits at an address become EBX."""
    return b"\x66\x89\x1e" + struct.pack("<H", address)


def store_ecx(address: int) -> bytes:
    """The 32 bits at an address become ECX."""
    return b"\x66\x89\x0e" + struct.pack("<H", address)


def store_edx(address: int) -> bytes:
    """The 32 bits at an address become EDX."""
    return b"\x66\x89\x16" + struct.pack("<H", address)


def compare_eax(address: int) -> bytes:
    """Whether EAX is below the 32 bits at an address, without signs."""
    return b"\x66\x3b\x06" + struct.pack("<H", address)


def increment(address: int) -> bytes:
    """The 32 bits at an address become one more, atomically; what follows sees what others wrote before."""
    return b"\x66\xf0\xff\x06" + struct.pack("<H", address)


def unless_zero(then: bytes) -> bytes:
    """`then`, jumped over if the zero flag is set; at most 127 bytes."""
    return b"\x74" + struct.pack("<b", len(then)) + then


def unless_below(then: bytes) -> bytes:
    """`then`, jumped over if what was compared was below; at most 127 bytes."""
    return b"\x72" + struct.pack("<b", len(then)) + then


def forever(body: bytes) -> bytes:
    """`body` again and again; at most 126 bytes."""
    return body + b"\xeb" + struct.pack("<b", -len(body) - 2)


def out(port: int, value: int) -> bytes:
    """A byte to a port, through AL and DX."""
    return b"\xba" + struct.pack("<H", port) + mov_al(value) + b"\xee"


def out_al(port: int) -> bytes:
    """AL to a port, through DX."""
    return b"\xba" + struct.pack("<H", port) + b"\xee"


def in_al(port: int) -> bytes:
    """AL becomes a byte of a port, through DX."""
    return b"\xba" + struct.pack("<H", port) + b"\xec"


def write_msr(register: int, value: int) -> bytes:
    """A model-specific register becomes a number of 64 bits, through EAX, ECX and EDX."""
    return mov_ecx(register) + mov_eax(value & 0xFFFF_FFFF) + mov_edx(value >> 32) + WRMSR


def outs(writes: Iterable[tuple[int, int]]) -> bytes:
    """Bytes to ports, in order."""
    return b"".join(out(port, value) for port, value in writes)
