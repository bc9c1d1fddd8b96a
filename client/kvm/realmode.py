"""Our guest: it programs its interrupt controllers, sleeps, and counts what it takes.

A handler reads each device's interrupt status, which is what takes a PCI interrupt line down, ends the
interrupt where it came from, and counts. Everything is in the first 64 KiB: vectors, counters, code, stack.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from client.errors import ClientError
from client.kvm import _assembler as asm
from client.kvm._abi import IOAPIC_PINS
from client.kvm.state import RedirectionEntry

RAM: Final = 0x1_0000
ENTRY: Final = 0x1000
STACK: Final = 0xF000
_CODE_END: Final = 0xE000  # what lies between is the stack

TOTAL: Final = 0x600
"""Interrupts that were ended, on whatever input."""
ANSWERED: Final = 0x604
"""Registers that were not zero, in interrupts of whatever input."""
TOTAL_TARGET: Final = 0x608
ANSWERED_TARGET: Final = 0x60C
"""From how many on an interrupt is told by DONE_PORT."""
NEVER: Final = 0xFFFF_FFFF
SPURIOUS: Final = 0x610
"""Interrupts that a controller could not say the reason of: the line went down before it was asked."""
_INTERRUPTS: Final = 0x640
_NONZERO: Final = 0x6C0

READY_PORT: Final = 0xE0
DONE_PORT: Final = 0xE1
FAULT_PORT: Final = 0xE2
ENDED_PORT: Final = 0xE3

WINDOW: Final = 0xD_0000
"""Where devices' registers are: a page each."""
MAX_REGISTERS: Final = 8
"""Registers that a handler asks: the window ends at 0xD8000, and at each input there is room for the code."""

PIC_VECTORS: Final = 0x20
APIC_VECTORS: Final = 0x40
"""The vector of an I/O APIC's input 0; further inputs follow."""
_SPURIOUS_VECTOR: Final = 0xFF
_EXCEPTIONS: Final = 0x20
_VECTORS: Final = 0x100
_PIC_PINS: Final = 16

PIC_INPUTS: Final = frozenset({3, 4, 5, 6, 9, 10, 11, 12, 14})
"""Inputs of the 8259A pair that can be levels (PIIX4, ELCR), without 7 and 15, which stand for spurious
interrupts.
"""

_MASTER: Final = 0x20
_SLAVE: Final = 0xA0
_ELCR: Final = 0x4D0
_EOI: Final = 0x20

_MSR_APIC_BASE: Final = 0x1B
_APIC_BASE_X2: Final = 0xFEE0_0000 | 1 << 11 | 1 << 10 | 1 << 8  # enabled, x2APIC, the boot processor
_MSR_TPR: Final = 0x808
_MSR_EOI: Final = 0x80B
_MSR_SPURIOUS: Final = 0x80F
_APIC_ENABLE: Final = 1 << 8
_MSR_LINT0: Final = 0x835
_EXTINT: Final = 7 << 8  # what the 8259A wants, as it says it


def interrupts_of(gsi: int) -> int:
    """Where the interrupts of an input are counted."""
    return _INTERRUPTS + 4 * gsi


def nonzero_of(gsi: int) -> int:
    """Where it is counted how often a register was not zero in an interrupt of an input."""
    return _NONZERO + 4 * gsi


def redirection(gsi: int) -> RedirectionEntry:
    """How the I/O APIC is to treat an input that our guest takes."""
    return RedirectionEntry(vector=APIC_VECTORS + gsi, level=True, masked=False)


def program_pic(inputs: Sequence[int]) -> bytes:
    """Both 8259As from the beginning (82C59A, initialization command words): `inputs` are levels, and
    unmasked.
    """
    levels = sum(1 << number for number in inputs)
    mask = 0xFFFF & ~levels & ~(1 << 2 if levels >> 8 else 0)
    return asm.outs(
        [
            (_MASTER, 0x11),  # ICW1: cascaded, ICW4 follows
            (_MASTER + 1, PIC_VECTORS),  # ICW2
            (_MASTER + 1, 1 << 2),  # ICW3: the slave is on input 2
            (_MASTER + 1, 0x01),  # ICW4: 8086 mode
            (_SLAVE, 0x11),
            (_SLAVE + 1, PIC_VECTORS + 8),
            (_SLAVE + 1, 2),  # ICW3: I am on input 2
            (_SLAVE + 1, 0x01),
            (_ELCR, levels & 0xFF),
            (_ELCR + 1, levels >> 8),
            (_MASTER + 1, mask & 0xFF),  # OCW1
            (_SLAVE + 1, mask >> 8),
        ]
    )


def program_apic() -> bytes:
    """The local APIC in x2APIC mode (Intel SDM volume 3, 11.12): on, everything may come, and what the PIC
    wants as well.
    """
    return (
        asm.write_msr(_MSR_APIC_BASE, _APIC_BASE_X2)
        + asm.write_msr(_MSR_TPR, 0)
        + asm.write_msr(_MSR_SPURIOUS, _APIC_ENABLE | _SPURIOUS_VECTOR)
        + asm.write_msr(_MSR_LINT0, _EXTINT)
    )


def _end_at_pic(gsi: int) -> bytes:
    slave = asm.out(_SLAVE, _EOI) if gsi >= 8 else b""
    return slave + asm.out(_MASTER, _EOI)


_END_AT_APIC: Final = asm.write_msr(_MSR_EOI, 0)

# With a split irqchip KVM exits to tell of the end; but one that emulates our code goes on until it leaves
# for another reason, which with a halted processor is the next interrupt. So there is another reason.
_END_AT_SPLIT: Final = _END_AT_APIC + asm.out(ENDED_PORT, 0)


def _handler(gsi: int, registers: Sequence[int], end: bytes) -> bytes:
    """Ask the devices, end the interrupt, count it, tell if as many are waited for."""
    ask = b"".join(
        asm.load_al_es(offset)
        + asm.TEST_AL
        + asm.unless_zero(asm.increment(nonzero_of(gsi)) + asm.increment(ANSWERED))
        for offset in registers
    )
    tell = b"".join(
        asm.load_eax(count) + asm.compare_eax(target) + asm.unless_below(asm.out(DONE_PORT, 0))
        for count, target in ((TOTAL, TOTAL_TARGET), (ANSWERED, ANSWERED_TARGET))
    )
    return (
        asm.PUSH_EAX
        + asm.PUSH_ECX
        + asm.PUSH_EDX
        + asm.PUSH_ES
        + asm.mov_es(WINDOW >> 4)
        + ask
        + end
        + asm.increment(interrupts_of(gsi))
        + asm.increment(TOTAL)
        + tell
        + asm.POP_ES
        + asm.POP_EDX
        + asm.POP_ECX
        + asm.POP_EAX
        + asm.IRET
    )


_STRAY: Final = asm.increment(SPURIOUS) + asm.IRET
_FAULT: Final = asm.out(FAULT_PORT, 0) + asm.SPIN
# A spurious interrupt of the slave is a real one of the master's input 2.
_STRAY_OF_SLAVE: Final = asm.PUSH_EAX + asm.PUSH_EDX + _end_at_pic(2) + asm.POP_EDX + asm.POP_EAX + _STRAY


def counting_guest(inputs: Sequence[int], registers: Sequence[int], *, pic: bool) -> bytes:
    """The guest's memory: `inputs` that it takes, offsets in the window of `registers` that it reads at each,
    and whether there is a `pic` beside the local APIC.

    Raises ClientError for inputs and registers that there is no room for.
    """
    if len(registers) > MAX_REGISTERS:
        raise ClientError(f"{len(registers)} registers: a handler reads at most {MAX_REGISTERS}")
    for gsi in inputs:
        if not 0 <= gsi < IOAPIC_PINS or (pic and gsi < _PIC_PINS and gsi not in PIC_INPUTS):
            raise ClientError(f"input {gsi} cannot be a PCI interrupt line")
    on_pic = [gsi for gsi in inputs if pic and gsi < _PIC_PINS]
    main = (
        (program_pic(on_pic) if pic else b"")
        + program_apic()
        + asm.out(READY_PORT, 0)
        + asm.STI
        + asm.forever(asm.HLT)
    )
    handlers = {PIC_VECTORS + _PIC_PINS - 1: _STRAY_OF_SLAVE} if pic else {}
    end = _END_AT_APIC if pic else _END_AT_SPLIT
    handlers |= {APIC_VECTORS + gsi: _handler(gsi, registers, end) for gsi in inputs}
    handlers |= {PIC_VECTORS + gsi: _handler(gsi, registers, _end_at_pic(gsi)) for gsi in on_pic}
    return laid_out(main, handlers, _STRAY)


def laid_out(main: bytes, handlers: Mapping[int, bytes], otherwise: bytes) -> bytes:
    """Memory from 0 on: the vectors, `main` at ENTRY, `handlers` by vector and the one for all others; but
    exceptions tell FAULT_PORT. Raises ClientError if it is too much.
    """
    code = bytearray(main)
    places: dict[bytes, int] = {}

    def place(handler: bytes) -> int:
        if handler not in places:
            places[handler] = ENTRY + len(code)
            code.extend(handler)
        return places[handler]

    vectors = b"".join(
        struct.pack("<HH", place(handlers.get(vector, _FAULT if vector < _EXCEPTIONS else otherwise)), 0)
        for vector in range(_VECTORS)
    )
    if ENTRY + len(code) > _CODE_END:
        raise ClientError(f"{len(code)} bytes of guest code: there is room for {_CODE_END - ENTRY}")
    return vectors.ljust(ENTRY, b"\0") + bytes(code)
