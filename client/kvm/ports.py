"""A processor that does port accesses as it is told, and takes interrupts when it is told.

with open_port_driver(vm) as ports:
    await ports.write(0x20, 0x11)
    vector = await ports.take()
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from client.kvm import _assembler as asm
from client.kvm.errors import GuestError
from client.kvm.realmode import ENTRY, FAULT_PORT, RAM, STACK, laid_out
from client.kvm.vcpu import Exits, Vcpu
from client.kvm.vm import Vm

_ANSWER_PORT: Final = 0xE4
_NOTHING_PORT: Final = 0xE5
_TAKEN_PORT: Final = 0xE6
_WINDOW_PORT: Final = 0xE7


class _Answered(Exception):  # noqa: N818  (how a guest that has done its work is left)
    def __init__(self, port: int, value: int) -> None:
        self.port = port
        self.value = value


class _Answers(Exits):
    async def port_write(self, port: int, data: bytes) -> None:
        if port == FAULT_PORT:
            raise GuestError("the guest's code caused an exception of its processor")
        if port in (_ANSWER_PORT, _NOTHING_PORT, _TAKEN_PORT):
            raise _Answered(port, data[0])
        if port != _WINDOW_PORT:
            await super().port_write(port, data)


class PortDriver:
    """Made by `open_port_driver`. Raises GuestError for ports that nobody in the kernel has."""

    def __init__(self, vcpu: Vcpu, memory: mmap.mmap) -> None:
        self._vcpu = vcpu
        self._memory = memory

    async def write(self, port: int, value: int) -> None:
        """A byte to a port."""
        await self._do(asm.out(port, value) + asm.out(_ANSWER_PORT, 0))

    async def read(self, port: int) -> int:
        """A byte of a port."""
        return (await self._do(asm.in_al(port) + asm.out_al(_ANSWER_PORT))).value

    async def take(self) -> int | None:
        """The vector of the interrupt that is pending, acknowledged and not ended; None if there is none."""
        # A KVM that emulates our code looks for interrupts when it enters the guest, so it is made to.
        window = asm.STI + asm.NOP + asm.out(_WINDOW_PORT, 0) + asm.NOP + asm.CLI
        answer = await self._do(window + asm.out(_NOTHING_PORT, 0))
        return answer.value if answer.port == _TAKEN_PORT else None

    async def _do(self, code: bytes) -> _Answered:
        code += asm.SPIN
        self._memory[ENTRY : ENTRY + len(code)] = code
        self._vcpu.start_at(ENTRY, STACK)
        try:
            await self._vcpu.run(_Answers())
        except _Answered as answer:
            return answer
        raise GuestError("the guest halted instead of answering")


@contextmanager
def open_port_driver(vm: Vm) -> Iterator[PortDriver]:
    """Processor 0 of a VM for port accesses, with memory of its own; both are gone after the block."""
    told = {vector: asm.out(_TAKEN_PORT, vector) + asm.SPIN for vector in range(0x20, 0x100)}
    with mmap.mmap(-1, RAM) as memory, Vcpu(vm) as vcpu:
        room = asm.SPIN * 64  # where `_do` puts its code
        image = laid_out(room, told, asm.SPIN)
        memory[: len(image)] = image
        vm.add_memory(0, memory)
        try:
            yield PortDriver(vcpu, memory)
        finally:
            vm.remove_memory(0)
