"""A virtual machine on /dev/kvm: memory, an irqchip in the kernel, eventfds on its inputs.

    with Vm() as vm:
        vm.add_memory(0, memory)
        vm.irqfd(10, trigger_fd, resample_fd)

Everything is x86's (Documentation/virt/kvm/api.rst). Methods raise KvmError with KVM's errno.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from client.errors import ClientError
from client.kvm import _abi
from client.kvm._abi import Cap, Chip
from client.kvm._ioctl import flexible, ioctl
from client.kvm.cpuid import MAX_ENTRIES, CpuidEntry, Registers
from client.kvm.errors import KvmError
from client.kvm.routing import Route
from client.kvm.state import IoapicState, Pic8259State, PicState

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DEVICE: Final = "/dev/kvm"

MAX_GSI: Final = 4096
"""Inputs of a VM, beyond which KVM would accept an eventfd and never deliver it (KVM_MAX_IRQ_ROUTES)."""

_TSS: Final = 0xFFFB_D000  # three pages of guest memory that Intel's processors want for real mode

IrqchipKind = Literal["kernel", "split"]

_NEEDS: Final[dict[IrqchipKind | None, tuple[Cap, ...]]] = {
    None: (),
    "kernel": (Cap.IRQCHIP, Cap.IRQFD, Cap.IRQFD_RESAMPLE, Cap.IRQ_ROUTING),
    "split": (Cap.SPLIT_IRQCHIP, Cap.IRQFD, Cap.IRQ_ROUTING, Cap.SIGNAL_MSI),
}


class Vm:
    """A machine with both interrupt controllers of a PC in the kernel ("kernel"), with local APICs alone
    ("split"), or with none. A context manager; `close` ends it, and everything that was made with it.

    Raises KvmError if /dev/kvm cannot be had or lacks what is needed: ENOSYS for a capability.
    """

    def __init__(self, irqchip: IrqchipKind | None = "kernel") -> None:
        self.irqchip: Final = irqchip
        self.eoi_listeners: list[Callable[[int], None]] = []
        """Told the vector whenever a CPU ended an interrupt of an I/O APIC that is in user space."""
        self._slots: dict[int, tuple[int, memoryview]] = {}
        with ExitStack() as stack:
            self._system = _open_device()
            stack.callback(os.close, self._system)
            self._check()
            self.fd = self._make("KVM_CREATE_VM", self._system, _abi.CREATE_VM)
            stack.callback(os.close, self.fd)
            self._make("KVM_SET_TSS_ADDR", self.fd, _abi.SET_TSS_ADDR, _TSS)
            self._create_irqchip()
            self._closing = stack.pop_all()

    def _check(self) -> None:
        version = self._make("KVM_GET_API_VERSION", self._system, _abi.GET_API_VERSION)
        if version != _abi.API_VERSION:
            raise KvmError(f"KVM's interface is version {version}, not {_abi.API_VERSION}", errno.ENOSYS)
        for cap in (Cap.USER_MEMORY, Cap.READONLY_MEM, Cap.IMMEDIATE_EXIT, *_NEEDS[self.irqchip]):
            if not self._make("KVM_CHECK_EXTENSION", self._system, _abi.CHECK_EXTENSION, cap):
                raise KvmError(f"this KVM lacks KVM_CAP_{cap.name}", errno.ENOSYS)

    def _create_irqchip(self) -> None:
        if self.irqchip == "kernel":
            self._make("KVM_CREATE_IRQCHIP", self.fd, _abi.CREATE_IRQCHIP)
        elif self.irqchip == "split":
            cap = _abi.EnableCap(cap=Cap.SPLIT_IRQCHIP, args=(_abi.IOAPIC_PINS,))
            self._make("KVM_CAP_SPLIT_IRQCHIP", self.fd, _abi.ENABLE_CAP, cap)

    # memory

    def add_memory(self, address: int, memory: WriteableBuffer, *, read_only: bool = False) -> None:
        """Put bytes of ours at a guest-physical address: a private mapping, or a BAR's.

        Both ends are whole pages, and `memory` is lent until `remove_memory` or `close`. With `read_only` a
        guest's write exits as MMIO. Raises ClientError for what is not pages or cannot be written by us.
        """
        view = memoryview(memory).cast("B")
        try:
            host = ctypes.addressof(ctypes.c_uint8.from_buffer(view))
        except (TypeError, ValueError):
            raise ClientError(f"memory for {address:#x} is read-only, or empty") from None
        if (address | host | len(view)) % mmap.PAGESIZE:
            raise ClientError(f"memory for {address:#x}, {len(view):#x} bytes at {host:#x}: not whole pages")
        used = {slot for slot, _ in self._slots.values()}
        slot = next(number for number in range(len(used) + 1) if number not in used)
        try:
            self._set_slot(slot, address, len(view), host, _abi.MEM_READONLY if read_only else 0)
        except KvmError:
            view.release()
            raise
        self._slots[address] = (slot, view)

    def remove_memory(self, address: int) -> None:
        """Take back what was put there; a guest's access exits as MMIO from now on."""
        if address not in self._slots:
            raise ClientError(f"no memory was put at {address:#x}")
        slot, view = self._slots[address]
        self._set_slot(slot, address, 0, 0, 0)
        del self._slots[address]
        view.release()

    def _set_slot(self, slot: int, address: int, length: int, host: int, flags: int) -> None:
        region = _abi.MemoryRegion(
            slot=slot, flags=flags, guest_phys_addr=address, memory_size=length, userspace_addr=host
        )
        what = f"KVM_SET_USER_MEMORY_REGION {address:#x}+{length:#x}"
        self._make(what, self.fd, _abi.SET_USER_MEMORY_REGION, region)

    # interrupts

    def irqfd(self, gsi: int, trigger_fd: int, resample_fd: int | None = None) -> None:
        """KVM_IRQFD: `trigger_fd` raises input `gsi`; with `resample_fd` as a level that the end of interrupt
        takes down, and signals. KVM keeps the files: both descriptors may be closed.

        Raises KvmError: EINVAL for an input or an eventfd that is none, EBUSY for a `trigger_fd` that is in
        use already.
        """
        flags = 0 if resample_fd is None else _abi.IRQFD_RESAMPLE
        self._irqfd(gsi, trigger_fd, resample_fd or 0, flags)

    def remove_irqfd(self, gsi: int, trigger_fd: int) -> None:
        """Undo `irqfd`; when this returns KVM touches neither eventfd any more, and its level is down."""
        self._irqfd(gsi, trigger_fd, 0, _abi.IRQFD_DEASSIGN)

    def _irqfd(self, gsi: int, fd: int, resample_fd: int, flags: int) -> None:
        if not 0 <= gsi < MAX_GSI:
            raise KvmError(f"KVM_IRQFD of input {gsi}", errno.EINVAL)
        argument = _abi.Irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resample_fd)
        self._make(f"KVM_IRQFD of input {gsi}", self.fd, _abi.IRQFD, argument)

    def irq_line(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE: drive an input; its level is high while we do, or an eventfd does."""
        argument = _abi.IrqLevel(irq=gsi, level=level)
        self._make(f"KVM_IRQ_LINE of input {gsi}", self.fd, _abi.IRQ_LINE, argument)

    def set_routes(self, routes: Sequence[Route]) -> None:
        """KVM_SET_GSI_ROUTING: these are the routes, and no others. What is under way arrives by the old
        ones or the new.
        """
        argument = flexible(_abi.RoutingHeader(nr=len(routes)), [route.entry() for route in routes])
        self._make("KVM_SET_GSI_ROUTING", self.fd, _abi.SET_GSI_ROUTING, argument)

    def signal_msi(self, address: int, data: int) -> bool:
        """KVM_SIGNAL_MSI; whether a processor got it, for it may block it, or not be there."""
        argument = _abi.Msi(address_lo=address & 0xFFFF_FFFF, address_hi=address >> 32, data=data)
        try:
            return self._make("KVM_SIGNAL_MSI", self.fd, _abi.SIGNAL_MSI, argument) > 0
        except KvmError as error:
            if error.errno == errno.EPERM:  # KVM's -1: no local APIC is meant
                return False
            raise

    def pic_state(self) -> PicState:
        """A snapshot of both 8259As; raises KvmError(ENXIO) if they are not in the kernel."""
        master = Pic8259State.unpack(self._chip(Chip.PIC_MASTER))
        return PicState(master, Pic8259State.unpack(self._chip(Chip.PIC_SLAVE)))

    def ioapic_state(self) -> IoapicState:
        """A snapshot of the I/O APIC; raises KvmError(ENXIO) if it is not in the kernel."""
        return IoapicState.unpack(self._chip(Chip.IOAPIC))

    def set_ioapic_state(self, state: IoapicState) -> None:
        """Set the I/O APIC as a whole; inputs that are high are looked at again."""
        argument = _abi.Irqchip(chip_id=Chip.IOAPIC)
        data = state.pack()
        argument.state[: len(data)] = data
        self._make("KVM_SET_IRQCHIP", self.fd, _abi.SET_IRQCHIP, argument)

    def _chip(self, chip: Chip) -> bytes:
        argument = _abi.Irqchip(chip_id=chip)
        self._make("KVM_GET_IRQCHIP", self.fd, _abi.GET_IRQCHIP, argument)
        return bytes(argument.state)

    # processors

    def supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """What CPUID may answer in a guest, as this KVM proposes it (KVM_GET_SUPPORTED_CPUID)."""
        header, size = _abi.CpuidHeader(nent=MAX_ENTRIES), ctypes.sizeof(_abi.CpuidEntry)
        argument = flexible(header, bytes(MAX_ENTRIES * size))
        self._make("KVM_GET_SUPPORTED_CPUID", self._system, _abi.GET_SUPPORTED_CPUID, argument)
        data = bytes(argument)
        count = _abi.CpuidHeader.from_buffer_copy(data).nent
        first = ctypes.sizeof(header)
        raw = (_abi.CpuidEntry.from_buffer_copy(data, first + size * number) for number in range(count))
        return tuple(
            CpuidEntry(
                entry.function,
                entry.index,
                entry.flags,
                Registers(entry.eax, entry.ebx, entry.ecx, entry.edx),
            )
            for entry in raw
        )

    def create_vcpu(self, number: int) -> tuple[int, int]:
        """A processor's descriptor, the caller's, and the size of what is shared with it;
        `client.kvm.vcpu.Vcpu` is what one wants.
        """
        size = self._make("KVM_GET_VCPU_MMAP_SIZE", self._system, _abi.GET_VCPU_MMAP_SIZE)
        return self._make("KVM_CREATE_VCPU", self.fd, _abi.CREATE_VCPU, number), size

    @staticmethod
    def _make(doing: str, fd: int, request: int, argument: Any = 0) -> int:
        try:
            return ioctl(fd, request, argument)
        except OSError as error:
            raise KvmError(doing, error.errno or 0) from None

    def close(self) -> None:
        """End the machine; memory that was lent is given back. Processors must have been closed.

        Whatever is asked of it afterwards is refused with EBADF.
        """
        self._closing.close()
        self.fd = self._system = -1
        for _, view in self._slots.values():
            view.release()
        self._slots.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_device() -> int:
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise KvmError(f"{DEVICE} cannot be opened", error.errno or 0) from None
