"""KVM's irqchips: what they refuse, and the whole road from a real card to a guest's handler and back."""

import errno
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import pytest
import trio

from client.irqchip import InterruptController, IntxMode, IntxRoute, IrqchipError
from client.irqchip.intx import Intx, open_intx
from client.irqchip.kvm import KvmChip, KvmIoapic, KvmPic, KvmSplit
from client.kvm import RealModeMachine, Register, Vm, _abi, open_machine, open_port_driver, vm
from client.kvm._ioctl import ioctl
from client.kvm.vm import IrqchipKind
from tests.client.irqchip.card import ISR, REGISTERS, Card, Link
from tests.client.kvm.linked import linked
from tests.descriptors import no_fd_leaks

pytestmark = pytest.mark.vcpu

PATIENCE = 60
GSI = 10
OTHER = 11
INPUTS = (GSI, OTHER)

KINDS: list[tuple[IrqchipKind, type[KvmChip]]] = [
    ("kernel", KvmPic),
    ("kernel", KvmIoapic),
    ("split", KvmSplit),
]
EACH = pytest.mark.parametrize(("kind", "chip_type"), KINDS, ids=["pic", "ioapic", "split"])
IN_KERNEL = pytest.mark.parametrize("chip_type", [KvmPic, KvmIoapic], ids=["pic", "ioapic"])


@contextmanager
def eventfds(count: int = 2) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    yield fds
    for fd in fds:
        os.close(fd)


@contextmanager
def made(kind: IrqchipKind, *types: type[KvmChip]) -> Iterator[tuple[Vm, list[KvmChip]]]:
    """A VM and irqchips over it, none of them active."""
    with no_fd_leaks(), Vm(kind) as machine:
        chips = [chip_type(machine) for chip_type in types]  # type: ignore[call-arg]
        yield machine, chips
        for chip in chips:
            chip.close()
        assert not machine.eoi_listeners


def high(machine: Vm) -> int:
    """The inputs that are high, at either chip; the master's for its slave does not count."""
    return (machine.pic_state().irr | machine.ioapic_state().irr) & ~(1 << 2)


async def program_levels(machine: Vm) -> None:
    """Our inputs of the 8259A pair are levels, as firmware has it for PCI; after power-on all are edges."""
    with open_port_driver(machine) as ports:
        await ports.write(0x4D1, 1 << GSI - 8 | 1 << OTHER - 8)


async def resampled(fd: int) -> None:
    """Until an eventfd is signalled, once."""
    with trio.fail_after(PATIENCE):
        await trio.lowlevel.wait_readable(fd)
    assert os.eventfd_read(fd) == 1


# --- what they refuse


@EACH
def test_an_eventfd_is_attached_once(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    with made(kind, chip_type) as (_, (chip,)), eventfds() as (trigger, resample):
        for active in (False, True):
            if active:
                chip.activate()
            chip.attach(GSI, trigger, resample)
            copy = os.dup(trigger)
            for gsi, fd in ((GSI, trigger), (OTHER, trigger), (OTHER, copy)):
                with pytest.raises(IrqchipError) as caught:
                    chip.attach(gsi, fd, resample)
                assert caught.value.errno == errno.EBUSY
            os.close(copy)
            chip.detach(GSI, trigger)


@EACH
def test_an_eventfd_that_kvm_has_already_is_refused_with_its_reason(
    kind: IrqchipKind, chip_type: type[KvmChip]
) -> None:
    with made(kind, chip_type) as (machine, (chip,)), eventfds() as (trigger, resample):
        chip.activate()
        machine.irqfd(OTHER, trigger)
        with pytest.raises(IrqchipError, match=r"KVM_IRQFD of input 10: .*\[EBUSY\]"):
            chip.attach(GSI, trigger, resample)
        machine.remove_irqfd(OTHER, trigger)
        chip.attach(GSI, trigger, resample)


@EACH
def test_inputs_that_there_are_not_are_refused(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    with made(kind, chip_type) as (_, (chip,)), eventfds() as (trigger, resample):
        chip.activate()
        for gsi in (-1, chip.inputs):
            with pytest.raises(IrqchipError) as caught:
                chip.attach(gsi, trigger, resample)
            assert caught.value.errno == errno.EINVAL
            with pytest.raises(IrqchipError) as caught:
                chip.set_level(gsi, True)
            assert caught.value.errno == errno.EINVAL
        chip.attach(chip.inputs - 1, trigger, resample)
        chip.set_level(chip.inputs - 1, True)


@EACH
def test_what_is_no_eventfd_is_refused(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    with made(kind, chip_type) as (_, (chip,)), eventfds() as (trigger, resample):
        chip.activate()
        read, write = os.pipe()
        for pair in ((read, resample), (trigger, read), (-1, resample), (trigger, -1)):
            with pytest.raises(IrqchipError) as caught:
                chip.attach(GSI, *pair)
            assert caught.value.errno == errno.EINVAL
        os.close(read)
        os.close(write)


@EACH
def test_detaching_what_is_not_attached_does_nothing(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    with made(kind, chip_type) as (_, (chip,)), eventfds() as (trigger, resample):
        chip.activate()
        chip.detach(GSI, trigger)
        chip.attach(GSI, trigger, resample)
        chip.detach(OTHER, trigger)
        chip.detach(GSI, trigger)
        chip.detach(GSI, trigger)
        chip.attach(OTHER, trigger, resample)
        chip.close()
        chip.close()


@IN_KERNEL
def test_a_chip_that_cannot_be_activated_leaves_nothing_behind(
    chip_type: type[KvmChip], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(fd: int, request: int, argument: object = 0) -> int:
        if request == _abi.IRQFD and argument.fd == last and not argument.flags & 1:  # type: ignore[attr-defined]
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return ioctl(fd, request, argument)  # type: ignore[arg-type]

    with made("kernel", chip_type) as (machine, (chip,)), eventfds(4) as (one, other, resample, third):
        chip.attach(GSI, one, resample)
        chip.attach(GSI, other, resample)
        last = list(chip._wires.values())[1].trigger_fd
        monkeypatch.setattr(vm, "ioctl", refuses)
        with pytest.raises(IrqchipError) as caught:
            chip.activate()
        assert caught.value.errno == errno.ENOMEM
        assert not chip.active
        machine.irqfd(OTHER, one, third)  # it is nobody's
        machine.remove_irqfd(OTHER, one)
        monkeypatch.undo()
        chip.activate()


def test_a_machine_has_the_chips_that_it_was_made_with() -> None:
    refusal = pytest.raises(IrqchipError, match=r"KVM_SET_GSI_ROUTING: .*\[EINVAL\]")
    with made("split", KvmPic) as (_, (pic,)), refusal:
        pic.activate()
    with Vm(None) as machine, pytest.raises(IrqchipError):
        KvmPic(machine).activate()


@EACH
def test_a_chip_outlives_its_machine(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    with made(kind, chip_type) as (machine, (chip,)), eventfds() as (trigger, resample):
        chip.activate()
        chip.attach(GSI, trigger, resample)
        machine.close()
        with pytest.raises(IrqchipError) as caught:
            chip.detach(GSI, trigger)
        assert caught.value.errno == errno.EBADF


# --- levels


@IN_KERNEL
async def test_a_level_is_high_while_anybody_drives_it(chip_type: type[KvmChip]) -> None:
    with made("kernel", chip_type) as (machine, (chip,)), eventfds() as (trigger, resample):
        await program_levels(machine)
        chip.activate()
        chip.set_level(GSI, True)
        chip.set_level(GSI, True)
        assert high(machine) == 1 << GSI
        chip.set_level(GSI, False)
        assert high(machine) == 0
        os.eventfd_write(trigger, 1)
        chip.attach(GSI, trigger, resample)
        while not high(machine):
            pass  # a worker of the kernel injects what had been counted
        chip.set_level(GSI, True)
        chip.detach(GSI, trigger)
        assert high(machine) == 1 << GSI
        chip.set_level(GSI, False)
        assert high(machine) == 0


@pytest.mark.parametrize(
    "types", [(KvmPic, KvmIoapic), (KvmIoapic, KvmPic)], ids=["pic to ioapic", "ioapic to pic"]
)
async def test_no_level_stays_behind_at_a_chip_that_is_left(types: Sequence[type[KvmChip]]) -> None:
    with made("kernel", *types) as (machine, (old, new)), eventfds() as (trigger, resample):
        await program_levels(machine)
        old.activate()
        old.set_level(OTHER, True)
        os.eventfd_write(trigger, 1)
        old.attach(GSI, trigger, resample)
        while high(machine) != 1 << GSI | 1 << OTHER:
            pass
        old.deactivate()
        assert high(machine) == 0
        new.activate()
        assert high(machine) == 0
        old.detach(GSI, trigger)
        new.attach(GSI, trigger, resample)
        new.deactivate()
        old.activate()
        assert high(machine) == 1 << OTHER, "a level that is still driven is there again"


@EACH
def test_an_inactive_chip_leaves_eventfds_alone(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    with made(kind, chip_type) as (_, (chip,)), eventfds() as (trigger, resample):
        chip.attach(GSI, trigger, resample)
        os.eventfd_write(trigger, 3)
        assert os.eventfd_read(trigger) == 3
        chip.activate()
        chip.activate()
        chip.deactivate()
        chip.deactivate()
        os.eventfd_write(trigger, 2)
        assert os.eventfd_read(trigger) == 2


@EACH
async def test_what_was_attached_all_the_while_says_it_again_when_the_chip_is_used_again(
    kind: IrqchipKind, chip_type: type[KvmChip]
) -> None:
    """As when another one could not be activated: nobody detaches then, and the level was taken down."""
    with made(kind, chip_type) as (machine, (chip,)), eventfds() as (trigger, resample):
        if kind == "kernel":
            await program_levels(machine)
        chip.activate()
        chip.attach(GSI, trigger, resample)
        os.eventfd_write(trigger, 1)
        while kind == "kernel" and not high(machine):
            pass
        chip.deactivate()
        chip.activate()
        assert os.eventfd_read(resample) == 1
        chip.activate()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(resample)


def test_an_inactive_split_irqchip_hears_of_no_end() -> None:
    with made("split", KvmSplit) as (machine, (chip,)), eventfds() as (trigger, resample):
        chip.attach(GSI, trigger, resample)
        (ended,) = machine.eoi_listeners
        ended(0x4A)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(resample)
        chip.activate()
        ended(0x4A)
        assert os.eventfd_read(resample) == 1


# --- the guest takes them


@EACH
async def test_an_interrupt_is_taken_ended_and_told(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    with made(kind, chip_type) as (machine, (chip,)), eventfds(4) as (one, end, other, other_end):
        async with open_machine(machine, inputs=INPUTS) as guest:
            chip.activate()
            chip.attach(GSI, one, end)
            chip.attach(OTHER, other, other_end)
            for times in range(1, 20):
                os.eventfd_write(one, 1)
                await resampled(end)
                os.eventfd_write(other, 1)
                await resampled(other_end)
                await guest.wait_for(2 * times)
                assert guest.interrupts(GSI) == guest.interrupts(OTHER) == times
            assert guest.spurious == 0


@EACH
async def test_what_was_counted_before_it_is_attached_is_one_interrupt(
    kind: IrqchipKind, chip_type: type[KvmChip]
) -> None:
    with made(kind, chip_type) as (machine, (chip,)), eventfds() as (trigger, resample):
        async with open_machine(machine, inputs=INPUTS) as guest:
            os.eventfd_write(trigger, 5)
            chip.attach(GSI, trigger, resample)
            chip.activate()
            await resampled(resample)
            await guest.wait_for(1)
            os.eventfd_write(trigger, 1)
            await resampled(resample)
            await guest.wait_for(2)
            assert guest.total == 2


@EACH
async def test_all_who_share_an_input_are_told_of_its_end(
    kind: IrqchipKind, chip_type: type[KvmChip]
) -> None:
    with made(kind, chip_type) as (machine, (chip,)), eventfds(4) as (one, end, other, other_end):
        async with open_machine(machine, inputs=INPUTS) as guest:
            chip.activate()
            chip.attach(GSI, one, end)
            chip.attach(GSI, other, other_end)
            os.eventfd_write(one, 1)
            await resampled(end)
            await resampled(other_end)
            chip.detach(GSI, one)
            os.eventfd_write(one, 1)
            os.eventfd_write(other, 1)
            await resampled(other_end)
            await guest.wait_for(2)
            assert guest.total == 2
            assert os.eventfd_read(one) == 1


@EACH
async def test_a_level_that_is_driven_interrupts_until_it_is_let_go(
    kind: IrqchipKind, chip_type: type[KvmChip]
) -> None:
    with made(kind, chip_type) as (machine, (chip,)):
        async with open_machine(machine, inputs=INPUTS) as guest:
            chip.activate()
            with trio.fail_after(PATIENCE):
                chip.set_level(OTHER, True)
                await guest.wait_for(5)
                chip.set_level(OTHER, False)
                taken = guest.total
                chip.set_level(OTHER, True)
                await guest.wait_for(taken + 1)
            assert guest.interrupts(OTHER) == guest.total


# --- the road of a real card
#
# With the 8259A pair the guest takes exactly as many interrupts as the card has. A local APIC may end them by
# itself when it gives them to the guest; some KVMs that emulate code in real mode have such. Then the card is
# asked before its ISR was read, says that its line is high, and an interrupt follows that finds nothing: what
# the card was `seen` to want, and the `empty` reads, make up all interrupts.


@dataclass
class Road:
    """A card, its line, and the guest that takes its interrupts."""

    card: Card
    link: Link
    line: Intx
    controller: InterruptController
    guest: RealModeMachine

    async def settled(self) -> None:
        """Until the guest has heard of everything, and every interrupt is accounted for."""
        while self.card.high:
            await trio.lowlevel.checkpoint()
        await self.guest.wait_for_answers(self.card.rises)
        while self.guest.total != self.card.seen + self.card.empty:
            await trio.lowlevel.checkpoint()
        assert self.card.rises == self.card.seen == self.guest.answers
        assert self.guest.unread == 0


@asynccontextmanager
async def road(kind: IrqchipKind, *types: type[KvmChip]) -> AsyncIterator[tuple[Road, list[KvmChip]]]:
    """A card's INTx on input GSI of the first irqchip."""
    with made(kind, *types) as (machine, chips):
        async with linked() as (card, link):
            register = Register(link.session, REGISTERS, ISR)
            async with open_machine(machine, [register], inputs=INPUTS) as guest:
                controller = InterruptController(chips[0], [IntxRoute(IntxMode.ENABLED, GSI)])
                async with open_intx(link.session, controller) as line:
                    await line.enable()
                    assert line.accelerated
                    with trio.fail_after(PATIENCE):
                        yield Road(card, link, line, controller, guest), chips


@EACH
async def test_a_card_is_heard_exactly_as_often_as_it_wants(
    kind: IrqchipKind, chip_type: type[KvmChip]
) -> None:
    async with road(kind, chip_type) as (here, _):
        told = len(here.card.told)
        for times in range(1, 101):
            here.card.fire()
            await here.guest.wait_for_answers(times)
            assert here.guest.nonzero(GSI) == here.card.seen == here.card.rises == times
        await here.settled()
        assert len(here.card.told) == told, "no message: KVM told the card by the resample eventfd"


async def test_with_the_pic_there_is_no_interrupt_for_nothing() -> None:
    async with road("kernel", KvmPic) as (here, _):
        for times in range(1, 101):
            here.card.fire()
            await here.guest.wait_for(times)
            assert here.guest.interrupts(GSI) == here.guest.nonzero(GSI) == times
        assert (here.guest.total, here.card.empty, here.guest.spurious) == (100, 0, 0)


@EACH
async def test_a_card_whose_line_stays_high_interrupts_again(
    kind: IrqchipKind, chip_type: type[KvmChip]
) -> None:
    async with road(kind, chip_type) as (here, _):
        here.card.eager = True
        here.card.fire()
        await here.guest.wait_for_answers(100)
        here.card.eager = False
        await here.settled()
        assert here.card.rises > 100
        if chip_type is KvmPic:
            assert here.card.empty == 0
        here.card.fire()
        await here.settled()


@EACH
async def test_the_line_follows_its_route(kind: IrqchipKind, chip_type: type[KvmChip]) -> None:
    async with road(kind, chip_type) as (here, _):
        here.card.fire()
        await here.settled()
        await here.controller.set_route(0, IntxRoute(IntxMode.ENABLED, OTHER))
        here.card.fire()
        await here.settled()
        assert (here.guest.nonzero(GSI), here.guest.nonzero(OTHER)) == (1, 1)


async def test_a_card_under_load_is_heard_through_changes_of_the_irqchip() -> None:
    """The 8259A pair and the I/O APIC of one VM take turns under a running guest."""
    changes = 100
    async with road("kernel", KvmPic, KvmIoapic) as (here, chips):
        here.card.eager = True
        here.card.fire()
        for number in range(1, changes + 1):
            answers = here.guest.answers
            await here.controller.activate(chips[number % 2])
            assert here.line.accelerated
            await here.guest.wait_for_answers(answers + 3)
        here.card.eager = False
        await here.settled()
        here.card.fire()
        await here.settled()
        assert here.line.failure is None
        assert len(here.line.dark) == changes
