"""Our instructions against those of a real assembler."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from client.kvm import _assembler as asm

INSTRUCTIONS = {
    "cli": asm.CLI,
    "sti": asm.STI,
    "hlt": asm.HLT,
    "nop": asm.NOP,
    "iret": asm.IRET,
    "cpuid": asm.CPUID,
    "wrmsr": asm.WRMSR,
    "1: jmp 1b": asm.SPIN,
    "pushl %eax": asm.PUSH_EAX,
    "pushl %ecx": asm.PUSH_ECX,
    "pushl %edx": asm.PUSH_EDX,
    "push %es": asm.PUSH_ES,
    "popl %eax": asm.POP_EAX,
    "popl %ecx": asm.POP_ECX,
    "popl %edx": asm.POP_EDX,
    "pop %es": asm.POP_ES,
    "test %al, %al": asm.TEST_AL,
    "movb $0x5a, %al": asm.mov_al(0x5A),
    "movl $0xfee00d00, %eax": asm.mov_eax(0xFEE0_0D00),
    "movl $0x80b, %ecx": asm.mov_ecx(0x80B),
    "movl $0x12345678, %edx": asm.mov_edx(0x1234_5678),
    "movw $0xd000, %ax; movw %ax, %es": asm.mov_es(0xD000),
    "movb %es:0x1010, %al": asm.load_al_es(0x1010),
    "movb %al, %es:0x1010": asm.store_al_es(0x1010),
    "movl 0x604, %eax": asm.load_eax(0x604),
    "movl %eax, 0x604": asm.store_eax(0x604),
    "movl %ebx, 0x604": asm.store_ebx(0x604),
    "movl %ecx, 0x604": asm.store_ecx(0x604),
    "movl %edx, 0x604": asm.store_edx(0x604),
    "cmpl 0x604, %eax": asm.compare_eax(0x604),
    "lock incl 0x604": asm.increment(0x604),
    "jz 1f; hlt; hlt; 1:": asm.unless_zero(asm.HLT * 2),
    "jb 1f; hlt; hlt; 1:": asm.unless_below(asm.HLT * 2),
    "1: hlt; nop; jmp 1b": asm.forever(asm.HLT + asm.NOP),
    "movw $0x4d0, %dx; movb $7, %al; outb %al, %dx": asm.out(0x4D0, 7),
    "movw $0x4d0, %dx; outb %al, %dx": asm.out_al(0x4D0),
    "movw $0x4d0, %dx; inb %dx, %al": asm.in_al(0x4D0),
    "movl $0x1b, %ecx; movl $2, %eax; movl $1, %edx; wrmsr": asm.write_msr(0x1B, 0x1_0000_0002),
}


def test_instructions_are_those_of_a_real_assembler(
    tmp_path: Path, demand: Callable[[bool, str], None]
) -> None:
    demand(shutil.which("as") is not None and shutil.which("objcopy") is not None, "there are no binutils")
    source, linked, binary = (tmp_path / name for name in ("code.s", "code.o", "code.bin"))
    source.write_text(
        ".code16\n" + "\n".join(f"{text}\n.byte 0xcc, 0xcc, 0xcc" for text in INSTRUCTIONS) + "\n"
    )
    subprocess.run(["as", "--32", "-o", linked, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", linked, binary], check=True)
    theirs = binary.read_bytes().split(b"\xcc\xcc\xcc")[:-1]
    assert dict(zip(INSTRUCTIONS, theirs, strict=True)) == INSTRUCTIONS


@pytest.mark.parametrize("jump", [asm.unless_zero, asm.unless_below])
def test_a_jump_is_short(jump: Callable[[bytes], bytes]) -> None:
    assert len(jump(asm.NOP * 127)) == 129
    with pytest.raises(Exception, match="format requires"):
        jump(asm.NOP * 128)


def test_a_loop_is_short() -> None:
    assert len(asm.forever(asm.NOP * 126)) == 128
    with pytest.raises(Exception, match="format requires"):
        asm.forever(asm.NOP * 127)
