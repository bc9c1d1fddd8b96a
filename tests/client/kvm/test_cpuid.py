import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.kvm import _assembler as asm
from client.kvm.cpuid import (
    LEAF,
    CpuidEntry,
    Policy,
    Registers,
    SevCaps,
    filter_cpuid,
    mask_cpuid_8000_001f,
)
from client.kvm.vcpu import Exits, Vcpu
from client.kvm.vm import Vm

ALL = 0xFFFF_FFFF
EVERY_CAP = SevCaps(ALL)
POLICIES: tuple[Policy, ...] = ("2019", "v7")

# A processor of the second generation: SME, SEV, flush by page, SEV-ES; C-bit 47, five address bits less.
ROME = Registers(0x0001_000F, 0x0000_016F, 0x0000_01FD, 0x0000_0001)
# One of the fourth: SEV-SNP and coherency as well; C-bit 51, four levels of privilege.
GENOA = Registers(0x0057_9FFF, 0x0000_4173, 0x0000_03EE, 0x0000_0100)

NUMBERS = st.integers(0, ALL)
LEAVES = st.builds(Registers, NUMBERS, NUMBERS, NUMBERS, NUMBERS)


@pytest.mark.parametrize(
    ("raw", "caps", "policy", "seen"),
    [
        (ROME, SevCaps.SEV, "2019", Registers(0x2, 47, 0, 0)),
        (ROME, SevCaps.SEV | SevCaps.SEV_ES, "2019", Registers(0x2, 47, 0, 0)),
        (ROME, EVERY_CAP, "2019", Registers(0x2, 47, 0, 0)),
        (ROME, SevCaps.SEV, "v7", Registers(0x2, 47, 0x1FD, 1)),
        (ROME, SevCaps.SEV | SevCaps.SEV_ES, "v7", Registers(0xA, 47, 0x1FD, 1)),
        (ROME, EVERY_CAP, "v7", Registers(0xA, 47, 0x1FD, 1)),
        (GENOA, EVERY_CAP, "2019", Registers(0x2, 51, 0, 0)),
        (GENOA, EVERY_CAP, "v7", Registers(0x41A, 51, 0x3EE, 0x100)),
        (GENOA, SevCaps.SEV | SevCaps.SEV_SNP, "v7", Registers(0x12, 51, 0x3EE, 0x100)),
        (GENOA, SevCaps.SEV | SevCaps.SME_COHERENT, "v7", Registers(0x402, 51, 0x3EE, 0x100)),
        # Without SEV, in the processor or in KVM, there is nothing to tell.
        (GENOA, SevCaps(0), "2019", Registers()),
        (GENOA, SevCaps(0), "v7", Registers()),
        (GENOA, SevCaps.SEV_ES | SevCaps.SEV_SNP, "v7", Registers()),
        (GENOA._replace(eax=GENOA.eax & ~SevCaps.SEV), EVERY_CAP, "2019", Registers()),
        (GENOA._replace(eax=GENOA.eax & ~SevCaps.SEV), EVERY_CAP, "v7", Registers()),
        (Registers(ALL, ALL, ALL, ALL), EVERY_CAP, "2019", Registers(0x2, 0x3F, 0, 0)),
        (Registers(ALL, ALL, ALL, ALL), EVERY_CAP, "v7", Registers(0x41A, 0x3F, ALL, ALL)),
    ],
)
def test_the_leaf_is_cut_down_to_the_bit(
    raw: Registers, caps: SevCaps, policy: Policy, seen: Registers
) -> None:
    assert mask_cpuid_8000_001f(raw, caps, policy) == seen


@given(raw=LEAVES, caps=NUMBERS)
def test_no_bit_outside_the_whitelist_survives(raw: Registers, caps: int) -> None:
    for policy, whitelist in (("2019", (0x2, 0x3F, 0, 0)), ("v7", (0x41A, 0x3F, ALL, ALL))):
        seen = mask_cpuid_8000_001f(raw, SevCaps(caps), policy)  # type: ignore[arg-type]
        for before, after, allowed in zip(raw, seen, whitelist, strict=True):
            assert after & ~allowed == 0
            assert after & ~before == 0
        assert seen.eax & ~caps == 0
        assert seen == Registers() or seen.eax & SevCaps.SEV


@given(raw=LEAVES, position=st.sampled_from([47, 51]), policy=st.sampled_from(POLICIES))
def test_the_position_of_the_c_bit_comes_through(raw: Registers, position: int, policy: Policy) -> None:
    raw = raw._replace(eax=raw.eax | SevCaps.SEV, ebx=raw.ebx & ~0x3F | position)
    seen = mask_cpuid_8000_001f(raw, SevCaps.SEV, policy)
    assert seen.ebx == position
    assert mask_cpuid_8000_001f(seen, SevCaps.SEV, policy) == seen


@given(LEAVES, st.integers(0, ALL))
def test_other_leaves_stay_as_they_are(registers: Registers, function: int) -> None:
    entries = (CpuidEntry(LEAF, 0, 0, GENOA), CpuidEntry(function, 1, 1, registers))
    first, second = filter_cpuid(entries, SevCaps.SEV, "2019")
    assert first.registers == Registers(0x2, 51)
    if function != LEAF:
        assert second == entries[1]


async def executed(vm: Vm, cpuid: tuple[CpuidEntry, ...] | None) -> Registers:
    """What a guest's CPUID instruction answers to LEAF."""
    code = asm.mov_eax(LEAF) + asm.mov_ecx(0) + asm.CPUID
    code += asm.store_eax(0x800) + asm.store_ebx(0x804) + asm.store_ecx(0x808) + asm.store_edx(0x80C)
    code += asm.HLT
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        memory[: len(code)] = code
        vm.add_memory(0, memory)
        with Vcpu(vm, cpuid=cpuid) as vcpu:
            vcpu.start_at(0)
            await vcpu.run(Exits())
        vm.remove_memory(0)
        seen = memory[0x800:0x810]
    return Registers(*(int.from_bytes(seen[at : at + 4], "little") for at in range(0, 16, 4)))


@pytest.mark.vcpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("raw", [ROME, GENOA], ids=["C-bit 47", "C-bit 51"])
async def test_a_guest_sees_the_leaf_as_it_was_masked(raw: Registers, policy: Policy) -> None:
    with Vm(None) as vm:
        others = tuple(entry for entry in vm.supported_cpuid() if entry.function != LEAF)
        host = (*others, CpuidEntry(LEAF, 0, 0, raw))
        assert await executed(vm, host) == raw
    with Vm(None) as vm:
        seen = await executed(vm, filter_cpuid(host, SevCaps.SEV | SevCaps.SEV_ES, policy))
        assert seen == mask_cpuid_8000_001f(raw, SevCaps.SEV | SevCaps.SEV_ES, policy)


@pytest.mark.vcpu
async def test_a_guest_of_ours_hears_nothing_of_encrypted_memory() -> None:
    with Vm(None) as vm:
        assert await executed(vm, None) == Registers()


@pytest.mark.vcpu
def test_kvm_proposes_an_apic_that_is_used_by_model_specific_registers() -> None:
    with Vm() as vm:
        (leaf,) = (entry for entry in vm.supported_cpuid() if entry.function == 1)
        assert leaf.registers.ecx >> 21 & 1
