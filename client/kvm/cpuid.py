"""What a guest sees of the processor: KVM's answers, and the leaf about encrypted memory cut down to what
can be kept.

Leaf 0x8000001F (AMD APM volume 3, E.4.17) tells of SEV. A guest uses bit 1 of EAX, to know that it may read
the SEV_STATUS register, and EBX 5:0, the position of the C-bit in its page tables. Most other bits promise
what a guest of this host does not get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Final, Literal, NamedTuple

LEAF: Final = 0x8000_001F

MAX_ENTRIES: Final = 256
"""Entries asked of KVM, and given to it (KVM_MAX_CPUID_ENTRIES in arch/x86/include/asm/kvm_host.h)."""

_C_BIT_POSITION: Final = 0x3F

Policy = Literal["2019", "v7"]


class SevCaps(IntFlag):
    """Bits of EAX."""

    SME = 1 << 0
    SEV = 1 << 1
    VM_PAGE_FLUSH = 1 << 2
    SEV_ES = 1 << 3
    SEV_SNP = 1 << 4
    SME_COHERENT = 1 << 10


_ADVERTISED: Final = SevCaps.SEV | SevCaps.SEV_ES | SevCaps.SEV_SNP | SevCaps.SME_COHERENT


class Registers(NamedTuple):
    """A leaf's four registers, 32 bits each."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


@dataclass(frozen=True, slots=True)
class CpuidEntry:
    """What CPUID answers to EAX `function` and, where `flags` say that it matters, ECX `index`."""

    function: int
    index: int
    flags: int
    registers: Registers


def mask_cpuid_8000_001f(raw: Registers, caps: SevCaps, policy: Policy) -> Registers:
    """What a guest may see of the host's leaf 0x8000001F; `caps` are those that KVM really enabled.

    Both policies say nothing at all without SEV, and keep of EBX only the position of the C-bit. "2019" is
    the rule that Peter Gonda proposed on the KVM list in November 2019: the SEV bit alone, ECX and EDX zero.
    "v7" is that of Linux 7.1 (arch/x86/kvm/cpuid.c, svm/sev.c): SEV, SEV-ES, SEV-SNP and coherency as far as
    enabled, never SME and VM_PAGE_FLUSH; ECX (encrypted guests at a time) and EDX (lowest SEV ASID) are the
    host's.
    """
    offered = raw.eax & caps
    if not offered & SevCaps.SEV:
        return Registers()
    ebx = raw.ebx & _C_BIT_POSITION
    if policy == "2019":
        return Registers(SevCaps.SEV, ebx)
    return Registers(offered & _ADVERTISED, ebx, raw.ecx, raw.edx)


def filter_cpuid(entries: tuple[CpuidEntry, ...], caps: SevCaps, policy: Policy) -> tuple[CpuidEntry, ...]:
    """All entries, with leaf 0x8000001F masked."""
    return tuple(
        replace(entry, registers=mask_cpuid_8000_001f(entry.registers, caps, policy))
        if entry.function == LEAF
        else entry
        for entry in entries
    )
