import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client import ClientError
from client.kvm import KvmError, Vm, _abi, vm
from client.kvm._ioctl import ioctl
from client.kvm.routing import Chip, IrqchipRoute, MsiRoute
from client.kvm.state import RedirectionEntry
from client.kvm.vm import MAX_GSI, IrqchipKind
from tests.descriptors import no_fd_leaks

PAGE = mmap.PAGESIZE


# --- a host without KVM, or with little of it


def test_a_host_without_kvm_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "DEVICE", str(tmp_path / "kvm"))
    with no_fd_leaks(), pytest.raises(KvmError, match=r"/kvm cannot be opened: .*\[ENOENT\]$") as caught:
        Vm()
    assert caught.value.errno == errno.ENOENT


def test_a_device_that_we_may_not_open_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", forbid)
    with pytest.raises(KvmError, match=r"^/dev/kvm cannot be opened: Permission denied \[EACCES\]$"):
        Vm()


def test_a_file_that_is_not_kvm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kvm").touch()
    monkeypatch.setattr(vm, "DEVICE", str(tmp_path / "kvm"))
    with no_fd_leaks(), pytest.raises(KvmError, match="KVM_GET_API_VERSION"):
        Vm()


def answering(request: int, argument: int | None, answer: int) -> Callable[..., int]:
    def answers(fd: int, asked: int, with_argument: Any = 0) -> int:
        if asked == request and argument in (None, with_argument):
            return answer
        return ioctl(fd, asked, with_argument)

    return answers


@pytest.mark.vcpu
@pytest.mark.parametrize(
    ("kind", "cap"),
    [
        (None, _abi.Cap.IMMEDIATE_EXIT),
        (None, _abi.Cap.READONLY_MEM),
        ("kernel", _abi.Cap.IRQCHIP),
        ("kernel", _abi.Cap.IRQFD),
        ("kernel", _abi.Cap.IRQFD_RESAMPLE),
        ("kernel", _abi.Cap.IRQ_ROUTING),
        ("split", _abi.Cap.SPLIT_IRQCHIP),
        ("split", _abi.Cap.SIGNAL_MSI),
    ],
)
def test_what_kvm_lacks_is_told_by_name(
    kind: IrqchipKind | None, cap: _abi.Cap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm, "ioctl", answering(_abi.CHECK_EXTENSION, cap, 0))
    with no_fd_leaks(), pytest.raises(KvmError, match=f"lacks KVM_CAP_{cap.name}: ") as caught:
        Vm(kind)
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.vcpu
def test_what_is_not_used_may_be_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "ioctl", answering(_abi.CHECK_EXTENSION, _abi.Cap.SPLIT_IRQCHIP, 0))
    Vm("kernel").close()


@pytest.mark.vcpu
def test_a_kvm_of_another_age_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm, "ioctl", answering(_abi.GET_API_VERSION, None, 11))
    with no_fd_leaks(), pytest.raises(KvmError, match="version 11, not 12"):
        Vm()


@pytest.mark.vcpu
def test_a_machine_that_has_ended_refuses_everything() -> None:
    with no_fd_leaks():
        machine = Vm()
        machine.close()
        machine.close()
        with Vm() as other:  # has the descriptors' numbers
            for asked in (machine.pic_state, machine.supported_cpuid, lambda: machine.irq_line(5, True)):
                with pytest.raises(KvmError) as caught:
                    asked()
                assert caught.value.errno == errno.EBADF
            assert other.pic_state().irr == 0


# --- memory


@pytest.mark.vcpu
def test_memory_is_lent_until_the_machine_ends() -> None:
    with no_fd_leaks(), mmap.mmap(-1, 2 * PAGE) as memory:
        with Vm(None) as machine:
            machine.add_memory(0, memory)
            with pytest.raises(BufferError):
                memory.close()
        memory.resize(PAGE)


@pytest.mark.vcpu
def test_memory_that_was_taken_back_is_ours_and_its_slot_is_free() -> None:
    with mmap.mmap(-1, PAGE) as one, mmap.mmap(-1, PAGE) as other, Vm(None) as machine:
        machine.add_memory(0, one)
        machine.add_memory(PAGE, other)
        machine.remove_memory(0)
        one.close()
        with mmap.mmap(-1, PAGE) as third:
            machine.add_memory(0x10 * PAGE, third)
            machine.remove_memory(0x10 * PAGE)
        with pytest.raises(ClientError, match="no memory was put at 0x0"):
            machine.remove_memory(0)


@pytest.mark.vcpu
def test_memory_over_other_memory_is_refused_and_not_kept() -> None:
    with mmap.mmap(-1, PAGE) as one, mmap.mmap(-1, PAGE) as other, Vm(None) as machine:
        machine.add_memory(0, one)
        with pytest.raises(KvmError) as caught:
            machine.add_memory(0, other)
        assert caught.value.errno == errno.EEXIST
        other.close()
        machine.remove_memory(0)


@pytest.mark.vcpu
def test_memory_is_whole_pages_that_we_may_write() -> None:
    with Vm(None) as machine:
        with mmap.mmap(-1, PAGE) as memory:
            with pytest.raises(ClientError, match="not whole pages"):
                machine.add_memory(0x800, memory)
            with pytest.raises(ClientError, match="not whole pages"), memoryview(memory)[16:] as part:
                machine.add_memory(0, part)
        with (
            mmap.mmap(-1, PAGE, prot=mmap.PROT_READ) as memory,
            pytest.raises(ClientError, match="read-only"),
        ):
            machine.add_memory(0, memory)


# --- interrupts


@pytest.mark.vcpu
def test_an_input_that_is_driven_is_seen_at_the_pic() -> None:
    with Vm() as machine:
        machine.set_routes([IrqchipRoute(5, Chip.PIC_MASTER, 5)])
        machine.irq_line(5, True)
        assert machine.pic_state().irr == 1 << 5
        assert machine.ioapic_state().irr == 0
        machine.irq_line(5, False)
        machine.set_routes([IrqchipRoute(5, Chip.IOAPIC, 7)])
        machine.irq_line(5, True)
        assert machine.ioapic_state().irr == 1 << 7


@pytest.mark.vcpu
def test_an_eventfd_drives_an_input_while_it_is_there() -> None:
    trigger, resample = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    with Vm() as machine:
        machine.set_routes([IrqchipRoute(20, Chip.IOAPIC, 20)])
        state = machine.ioapic_state()
        entry = RedirectionEntry(vector=0x50, level=True)
        machine.set_ioapic_state(replace(state, entries=(*state.entries[:20], entry, *state.entries[21:])))
        os.eventfd_write(trigger, 1)
        machine.irqfd(20, trigger, resample)
        while not machine.ioapic_state().irr:
            pass  # what it counted before is injected by a worker of the kernel
        machine.remove_irqfd(20, trigger)
        assert machine.ioapic_state().irr == 0
        assert machine.ioapic_state().entries[20] == entry
    for fd in (trigger, resample):
        os.close(fd)


@pytest.mark.vcpu
def test_refusals_of_eventfds_have_kvms_reason() -> None:
    with Vm() as machine, no_fd_leaks():
        trigger, resample = os.eventfd(0), os.eventfd(0)
        machine.irqfd(10, trigger, resample)
        with pytest.raises(KvmError, match="KVM_IRQFD of input 11") as caught:
            machine.irqfd(11, trigger, resample)
        assert caught.value.errno == errno.EBUSY
        for gsi in (-1, MAX_GSI):
            with pytest.raises(KvmError) as caught:
                machine.irqfd(gsi, resample, trigger)
            assert caught.value.errno == errno.EINVAL
        machine.irqfd(MAX_GSI - 1, resample, trigger)
        read, write = os.pipe()
        with pytest.raises(KvmError) as caught:
            machine.irqfd(10, read)
        assert caught.value.errno == errno.EINVAL
        for fd in (trigger, resample, read, write):
            os.close(fd)


@pytest.mark.vcpu
def test_a_split_irqchip_takes_no_resample_eventfd() -> None:
    trigger, resample = os.eventfd(0), os.eventfd(0)
    with Vm("split") as machine:
        machine.set_routes([MsiRoute(10, 0x4A, level=True)])
        with pytest.raises(KvmError) as caught:
            machine.irqfd(10, trigger, resample)
        assert caught.value.errno == errno.EINVAL
        machine.irqfd(10, trigger)
        with pytest.raises(KvmError) as caught:
            machine.pic_state()
        assert caught.value.errno == errno.ENXIO
    os.close(trigger)
    os.close(resample)


@pytest.mark.vcpu
def test_a_message_to_nobody_reaches_nobody() -> None:
    with Vm() as machine:
        assert not machine.signal_msi(0xFEE0_5000, 0x40)
