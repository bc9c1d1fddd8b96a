"""Our guest takes the interrupts of a real card, served in this process."""

import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from client.kvm import GuestError, RealModeMachine, Register, Vm, open_machine, realmode
from client.kvm import _assembler as asm
from client.kvm.realmode import WINDOW
from client.kvm.routing import Chip, IrqchipRoute
from protocol.vfio import RegionIndex
from tests.client.irqchip.card import ISR, MEMORY, REGISTERS
from tests.client.kvm.linked import linked
from tests.descriptors import no_fd_leaks

pytestmark = pytest.mark.vcpu

PATIENCE = 20
GSI = 10
OTHER = 11


@asynccontextmanager
async def interrupted(vm: Vm, gsi: int = GSI) -> AsyncIterator[None]:
    """An input of the PIC is high within the block."""
    vm.set_routes([IrqchipRoute(gsi, Chip.PIC_SLAVE, gsi - 8)])
    vm.irq_line(gsi, True)
    try:
        with trio.fail_after(PATIENCE):
            yield
    finally:
        vm.irq_line(gsi, False)


async def past(vm: Vm, machine: RealModeMachine) -> None:
    """Until the handlers of GSI, whose line is low by now, have ended: one of another input follows them."""
    async with interrupted(vm, OTHER):
        while not machine.interrupts(OTHER):
            await trio.lowlevel.checkpoint()


async def test_a_level_interrupts_until_it_is_low() -> None:
    with no_fd_leaks(), Vm() as vm:
        async with open_machine(vm, inputs=[GSI, OTHER]) as machine:
            assert machine.total == 0
            async with interrupted(vm):
                await machine.wait_for(5)
            await past(vm, machine)
            taken = machine.interrupts(GSI)
            assert taken >= 5
            assert machine.nonzero(GSI) == machine.interrupts(12) == 0
            async with interrupted(vm, OTHER):
                await machine.wait_for(machine.total + 5)
            assert machine.interrupts(GSI) == taken


async def test_what_has_been_is_not_waited_for() -> None:
    with Vm() as vm:
        async with open_machine(vm, inputs=[GSI]) as machine:
            await machine.wait_for(0)
            async with interrupted(vm):
                await machine.wait_for(3)
                await machine.wait_for(2)


async def test_answers_are_waited_for() -> None:
    async with linked() as (card, link):
        card.eager = True
        card.fire()
        with Vm() as vm:
            register = Register(link.session, REGISTERS, ISR)
            async with open_machine(vm, [register], inputs=[GSI]) as machine, interrupted(vm):
                await machine.wait_for_answers(5)
                assert machine.nonzero(GSI) >= 5
                assert machine.answers >= 5
        assert card.seen >= 5


async def test_registers_are_read_by_message_at_each_interrupt() -> None:
    async with linked() as (card, link):
        card.fire()
        with Vm() as vm:
            async with open_machine(vm, [Register(link.session, REGISTERS, ISR)], inputs=[GSI]) as machine:
                async with interrupted(vm):
                    await machine.wait_for(3)
                assert machine.nonzero(GSI) == 1
        assert card.seen == 1
        assert card.empty >= 2


async def test_registers_in_mapped_memory_are_read_without_an_exit() -> None:
    async with linked() as (card, link):
        register = Register(link.session, MEMORY, 0x123, mapped=True)
        with Vm() as vm:
            async with open_machine(vm, [register], inputs=[GSI]) as machine, interrupted(vm):
                await machine.wait_for(3)
                assert machine.nonzero(GSI) == 0
                await link.session.region_write(RegionIndex.BAR2, 0x123, b"\1")
                await machine.wait_for(machine.total + 3)
                assert machine.nonzero(GSI) >= 2
        assert card.function.accesses == 0


async def test_several_registers_are_read_each() -> None:
    async with linked() as (card, link), linked() as (other, other_link):
        registers = [Register(link.session, REGISTERS, ISR), Register(other_link.session, REGISTERS, ISR)]
        card.fire()
        other.fire()
        with Vm() as vm:
            async with open_machine(vm, registers, inputs=[GSI]) as machine:
                async with interrupted(vm):
                    await machine.wait_for(1)
                assert machine.nonzero(GSI) == 2
        assert card.seen == other.seen == 1


async def test_what_cannot_be_read_is_all_ones_and_counted() -> None:
    async with linked() as (_, link):
        register = Register(link.session, REGISTERS, ISR)
        with Vm() as vm:
            async with open_machine(vm, [register], inputs=[GSI, OTHER]) as machine:
                link.lose()
                await link.session.wait_end()
                async with interrupted(vm):
                    await machine.wait_for(2)
                await past(vm, machine)
                assert machine.nonzero(GSI) == machine.interrupts(GSI)
                assert machine.unread >= machine.answers > machine.nonzero(GSI)


async def test_nobody_is_told_of_interrupts_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    original = RealModeMachine.port_write

    async def noted(self: RealModeMachine, port: int, data: bytes) -> None:
        told.append(port)
        await original(self, port, data)

    monkeypatch.setattr(RealModeMachine, "port_write", noted)
    with Vm() as vm:
        async with open_machine(vm, inputs=[GSI]) as machine, interrupted(vm):
            await machine.wait_for(10)
            after = machine.total + 2  # one that was waited for too, and one that was under way
            while machine.total < after:
                await trio.lowlevel.checkpoint()
            before = len(told)
            while machine.total < after + 100:
                await trio.lowlevel.checkpoint()
            assert len(told) == before


async def test_a_register_may_be_read_by_another_session() -> None:
    async with linked() as (_, link), linked() as (card, other):
        register = Register(link.session, REGISTERS, ISR)
        with Vm() as vm:
            async with open_machine(vm, [register], inputs=[GSI]) as machine:
                register.session = other.session
                card.fire()
                async with interrupted(vm):
                    await machine.wait_for(1)
        assert card.seen == 1


@pytest.mark.parametrize("vector", [0x27, 0x2F])
async def test_interrupts_without_a_reason_are_counted_apart(vector: int) -> None:
    """The vectors that the two 8259As give those, which may as well come as messages."""
    with Vm() as vm:
        async with open_machine(vm, inputs=[GSI]) as machine:
            assert vm.signal_msi(0xFEE0_0000, vector)
            with trio.fail_after(PATIENCE):
                while not machine.spurious:
                    await trio.lowlevel.checkpoint()
            assert machine.total == 0
            async with interrupted(vm):
                await machine.wait_for(1)
            assert machine.spurious == 1


async def test_a_guest_that_reads_what_is_not_there_ends_the_machine() -> None:
    with mmap.mmap(-1, realmode.RAM) as memory:
        machine = RealModeMachine(memory, [])
        with pytest.raises(GuestError, match=f"reads 1 bytes at {WINDOW:#x}"):
            await machine.mmio_read(WINDOW, 1)
        with pytest.raises(GuestError, match="writes port 0x70"):
            await machine.port_write(0x70, b"\0")


async def test_a_guest_that_faults_ends_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realmode, "program_apic", lambda: asm.write_msr(0xDEAD_BEEF, 0))
    with (
        no_fd_leaks(),
        Vm() as vm,
        trio.fail_after(PATIENCE),
        pytest.raises(GuestError, match="an exception"),
    ):
        async with open_machine(vm):
            await trio.sleep_forever()


async def test_nothing_is_left_of_a_machine() -> None:
    with no_fd_leaks(), Vm() as vm:
        with pytest.raises(ZeroDivisionError):
            async with open_machine(vm, inputs=[GSI]):
                raise ZeroDivisionError
        with mmap.mmap(-1, mmap.PAGESIZE) as memory:
            vm.add_memory(0, memory)
            vm.remove_memory(0)
