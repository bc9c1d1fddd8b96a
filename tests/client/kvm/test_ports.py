import mmap

import pytest

from client.kvm import Vm, open_port_driver
from client.kvm.errors import GuestError
from client.kvm.realmode import PIC_INPUTS
from tests.descriptors import no_fd_leaks

pytestmark = pytest.mark.vcpu

LEVELS = sum(1 << number for number in PIC_INPUTS)


async def test_what_is_written_to_the_pic_is_its_state_and_is_read_back() -> None:
    with no_fd_leaks(), Vm() as vm, open_port_driver(vm) as ports:
        for port, value in ((0x20, 0x11), (0x21, 0x50), (0x21, 4), (0x21, 1), (0x21, 0xA5), (0x4D0, 0x78)):
            await ports.write(port, value)
        pic = vm.pic_state()
        assert (pic.master.irq_base, pic.master.imr, pic.master.elcr) == (0x50, 0xA5, 0x78)
        assert await ports.read(0x21) == 0xA5
        assert await ports.read(0x4D0) == 0x78


async def test_an_interrupt_is_taken_and_not_ended() -> None:
    with no_fd_leaks(), Vm() as vm, open_port_driver(vm) as ports:
        for port, value in ((0x20, 0x11), (0x21, 0x50), (0x21, 4), (0x21, 1), (0x21, 0)):
            await ports.write(port, value)
        assert await ports.take() is None
        vm.irq_line(5, True)
        vm.irq_line(3, True)
        assert vm.pic_state().irr & 0xFF == 1 << 3 | 1 << 5
        assert await ports.take() == 0x53
        assert (vm.pic_state().irr & 0xFF, vm.pic_state().isr) == (1 << 5, 1 << 3)
        assert await ports.take() is None
        await ports.write(0x20, 0x20)
        assert await ports.take() == 0x55


async def test_a_port_that_nobody_has_answers_the_guest_with_an_error() -> None:
    with no_fd_leaks(), Vm() as vm, open_port_driver(vm) as ports:
        with pytest.raises(GuestError, match="reads port 0x300"):
            await ports.read(0x300)
        with pytest.raises(GuestError, match="writes port 0x300"):
            await ports.write(0x300, 1)
        await ports.write(0x21, 0x5A)
        assert await ports.read(0x21) == 0x5A


async def test_the_memory_is_free_again_afterwards() -> None:
    with mmap.mmap(-1, mmap.PAGESIZE) as memory, Vm() as vm:
        with open_port_driver(vm) as ports:
            await ports.write(0x21, 0)
        vm.add_memory(0, memory)
