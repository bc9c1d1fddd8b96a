"""A machine that takes the interrupts of real devices: our guest on a processor, counting.

    with Vm() as vm:
        async with open_machine(vm, [Register(session, 0, ISR)], inputs=[10]) as machine:
            controller = InterruptController(KvmPic(vm), [IntxRoute(IntxMode.ENABLED, 10)])
            ...
            await machine.wait_for(1000)
            assert machine.interrupts(10) == 1000

Its handlers read each register and end the interrupt, at the 8259A or at the local APIC, wherever it came
from; so the irqchip may change while the guest runs.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Final

import trio

from client._nursery import background
from client._pages import PAGE
from client.errors import ClientError
from client.kvm import realmode
from client.kvm.errors import GuestError
from client.kvm.vcpu import Exits, Vcpu
from client.kvm.vm import Vm
from client.mapping import BarMapping
from client.session import Session

_NUMBER: Final = struct.Struct("<I")


@dataclass(slots=True)
class Register:
    """A byte that handlers read: at `offset` of a region, by message or, `mapped`, from the region's memory
    without leaving the guest.

    `session` may be set to another one with the same device.
    """

    session: Session
    region: int
    offset: int
    mapped: bool = False


class RealModeMachine(Exits):
    """Made by `open_machine`. What cannot be read reads as all ones, as on PCI, and `unread` counts it."""

    def __init__(self, memory: mmap.mmap, registers: Sequence[Register]) -> None:
        self.unread = 0
        self._memory = memory
        self._registers = registers
        self._ready = trio.Event()
        self._done = trio.Event()
        for target in (realmode.TOTAL_TARGET, realmode.ANSWERED_TARGET):
            _NUMBER.pack_into(memory, target, realmode.NEVER)

    def interrupts(self, gsi: int) -> int:
        """How many interrupts of an input were taken and ended."""
        return self._number(realmode.interrupts_of(gsi))

    def nonzero(self, gsi: int) -> int:
        """How often a register was not zero in one of them."""
        return self._number(realmode.nonzero_of(gsi))

    @property
    def total(self) -> int:
        """Interrupts of all inputs that were taken and ended."""
        return self._number(realmode.TOTAL)

    @property
    def answers(self) -> int:
        """How often registers were not zero, in interrupts of whatever input."""
        return self._number(realmode.ANSWERED)

    @property
    def spurious(self) -> int:
        """Interrupts without a reason: the input was low again before the CPU asked which it was."""
        return self._number(realmode.SPURIOUS)

    async def wait_for(self, total: int) -> None:
        """Wait until `total` interrupts were ended. One task at a time waits, for this or for answers."""
        await self._wait(realmode.TOTAL, realmode.TOTAL_TARGET, total)

    async def wait_for_answers(self, answers: int) -> None:
        """Wait until registers were not zero `answers` times; the last interrupt may not be ended yet.

        Where interrupts are ended early, as by a KVM whose local APIC does not wait for the guest, a line
        that is still high interrupts again for nothing: then this is what tells how often a card was heard.
        """
        await self._wait(realmode.ANSWERED, realmode.ANSWERED_TARGET, answers)

    async def _wait(self, count: int, target: int, number: int) -> None:
        self._done = trio.Event()
        _NUMBER.pack_into(self._memory, target, number)
        try:
            await trio.lowlevel.checkpoint()  # the guest sees the target before we look, or we see its count
            while self._number(count) < number:
                await self._done.wait()
                self._done = trio.Event()
        finally:
            _NUMBER.pack_into(self._memory, target, realmode.NEVER)

    def _number(self, address: int) -> int:
        number: int = _NUMBER.unpack_from(self._memory, address)[0]
        return number

    # what the guest does

    async def mmio_read(self, address: int, count: int) -> bytes:
        """A register."""
        page, offset = divmod(address - realmode.WINDOW, PAGE)
        if not 0 <= page < len(self._registers):
            return await super().mmio_read(address, count)
        register = self._registers[page]
        try:
            return await register.session.region_read(
                register.region, register.offset - register.offset % PAGE + offset, count
            )
        except ClientError:
            self.unread += 1
            return b"\xff" * count

    async def port_write(self, port: int, data: bytes) -> None:
        """What the guest tells."""
        if port == realmode.READY_PORT:
            self._ready.set()
        elif port == realmode.DONE_PORT:
            self._done.set()
        elif port == realmode.FAULT_PORT:
            raise GuestError("the guest's code caused an exception of its processor")
        elif port != realmode.ENDED_PORT:
            await super().port_write(port, data)

    async def wait_ready(self) -> None:
        """Until the guest has programmed its interrupt controllers."""
        await self._ready.wait()


@asynccontextmanager
async def open_machine(
    vm: Vm, registers: Sequence[Register] = (), *, inputs: Sequence[int] = (10,)
) -> AsyncIterator[RealModeMachine]:
    """Our guest on processor 0, ready for interrupts of `inputs`, until the block ends.

    `inputs` are levels. They lead to whatever the VM's routes say: `client.irqchip.kvm` sets them. Raises
    ClientError for inputs that a PCI line cannot use, KvmError, and GuestError if the guest fails.
    """
    offsets = [page * PAGE + register.offset % PAGE for page, register in enumerate(registers)]
    image = realmode.counting_guest(inputs, offsets, pic=vm.irqchip == "kernel")
    with mmap.mmap(-1, realmode.RAM) as memory, ExitStack() as stack:
        memory[: len(image)] = image
        stack.enter_context(_lent(vm, 0, memory))
        for page, register in enumerate(registers):
            if register.mapped:
                stack.enter_context(_mapped(vm, realmode.WINDOW + page * PAGE, register))
        vcpu = stack.enter_context(Vcpu(vm))
        if vm.irqchip == "kernel":
            _redirect(vm, inputs)
        machine = RealModeMachine(memory, registers)
        vcpu.start_at(realmode.ENTRY, realmode.STACK)
        async with background() as nursery:
            nursery.start_soon(vcpu.run, machine)
            await machine.wait_ready()
            yield machine


@contextmanager
def _lent(vm: Vm, address: int, memory: mmap.mmap | memoryview) -> Iterator[None]:
    vm.add_memory(address, memory)
    try:
        yield
    finally:
        vm.remove_memory(address)


@contextmanager
def _mapped(vm: Vm, address: int, register: Register) -> Iterator[None]:
    """The page of a region that has the register, as the guest's memory."""
    with (
        BarMapping(register.session.regions[register.region]) as mapping,
        mapping.view(register.offset - register.offset % PAGE, PAGE) as view,
        _lent(vm, address, view),
    ):
        yield


def _redirect(vm: Vm, inputs: Sequence[int]) -> None:
    """Program the I/O APIC in the kernel, as a guest in real mode cannot: it is beyond its addresses."""
    state = vm.ioapic_state()
    entries = [
        realmode.redirection(pin) if pin in inputs else entry for pin, entry in enumerate(state.entries)
    ]
    vm.set_ioapic_state(replace(state, entries=tuple(entries)))
