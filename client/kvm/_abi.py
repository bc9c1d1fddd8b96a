"""KVM's interface as data: <linux/kvm.h> and <asm/kvm.h> of x86, from Linux 6.12.

`Documentation/virt/kvm/api.rst` tells what each does. tests/client/kvm/test_abi.py holds sizes and numbers
against the host's own headers.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum
from typing import Final

API_VERSION: Final = 12
"""KVM_API_VERSION; has been this since 2007, and KVM asks to refuse any other."""


class Cap(IntEnum):
    """KVM_CAP_*, for KVM_CHECK_EXTENSION."""

    IRQCHIP = 0
    USER_MEMORY = 3
    IRQ_ROUTING = 25
    IRQFD = 32
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    SPLIT_IRQCHIP = 121
    IMMEDIATE_EXIT = 136


class ExitReason(IntEnum):
    """KVM_EXIT_*: why KVM_RUN came back."""

    UNKNOWN = 0
    IO = 2
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    IOAPIC_EOI = 26


class Chip(IntEnum):
    """KVM_IRQCHIP_*: a part of the irqchip in the kernel."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2


ROUTE_IRQCHIP: Final = 1
ROUTE_MSI: Final = 2
IRQFD_DEASSIGN: Final = 1 << 0
IRQFD_RESAMPLE: Final = 1 << 1
MEM_READONLY: Final = 1 << 1


class MemoryRegion(Structure):
    """kvm_userspace_memory_region."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


class IrqLevel(Structure):
    """kvm_irq_level."""

    _fields_ = (("irq", c_uint32), ("level", c_uint32))


class Irqfd(Structure):
    """kvm_irqfd."""

    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


class RoutingHeader(Structure):
    """kvm_irq_routing, without its entries."""

    _fields_ = (("nr", c_uint32), ("flags", c_uint32))


class RoutingEntry(Structure):
    """kvm_irq_routing_entry; `u` is {irqchip, pin} or {address_lo, address_hi, data}."""

    _fields_ = (
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", c_uint32 * 8),
    )


class Msi(Structure):
    """kvm_msi."""

    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    )


class EnableCap(Structure):
    """kvm_enable_cap."""

    _fields_ = (("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64))


class PicRegisters(Structure):
    """kvm_pic_state."""

    _fields_ = tuple(
        (name, c_uint8)
        for name in (
            "last_irr",
            "irr",
            "imr",
            "isr",
            "priority_add",
            "irq_base",
            "read_reg_select",
            "poll",
            "special_mask",
            "init_state",
            "auto_eoi",
            "rotate_on_auto_eoi",
            "special_fully_nested_mode",
            "init4",
            "elcr",
            "elcr_mask",
        )
    )


IOAPIC_PINS: Final = 24
"""KVM_IOAPIC_NUM_PINS."""


class IoapicRegisters(Structure):
    """kvm_ioapic_state."""

    _fields_ = (
        ("base_address", c_uint64),
        ("ioregsel", c_uint32),
        ("id", c_uint32),
        ("irr", c_uint32),
        ("pad", c_uint32),
        ("redirtbl", c_uint64 * IOAPIC_PINS),
    )


_CHIP_STATE: Final = 512


MP_STATE_RUNNABLE: Final = 0


class MpState(Structure):
    """kvm_mp_state."""

    _fields_ = (("mp_state", c_uint32),)


class Irqchip(Structure):
    """kvm_irqchip; `state` holds PicRegisters or IoapicRegisters."""

    _fields_ = (("chip_id", c_uint32), ("pad", c_uint32), ("state", c_uint8 * _CHIP_STATE))


class Regs(Structure):
    """kvm_regs."""

    _fields_ = tuple(
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags"),
        )
    )


class Segment(Structure):
    """kvm_segment."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *(
            (name, c_uint8)
            for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")
        ),
    )


class Sregs(Structure):
    """kvm_sregs; only the segments have names, the rest goes back as it came."""

    _fields_ = (
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("rest", c_uint8 * 120),
    )


class CpuidHeader(Structure):
    """kvm_cpuid2, without its entries."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class CpuidEntry(Structure):
    """kvm_cpuid_entry2."""

    _fields_ = (
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    )


class SignalMaskHeader(Structure):
    """kvm_signal_mask, without the mask: `len` bytes follow."""

    _fields_ = (("len", c_uint32),)


_NONE, _WRITE, _READ = 0, 1, 2
_KVMIO: Final = 0xAE


def _request(direction: int, number: int, argument: type[Structure] | None = None) -> int:
    """An ioctl's number (<asm-generic/ioctl.h>)."""
    return direction << 30 | (ctypes.sizeof(argument) if argument else 0) << 16 | _KVMIO << 8 | number


GET_API_VERSION: Final = _request(_NONE, 0x00)
CREATE_VM: Final = _request(_NONE, 0x01)
CHECK_EXTENSION: Final = _request(_NONE, 0x03)
GET_VCPU_MMAP_SIZE: Final = _request(_NONE, 0x04)
GET_SUPPORTED_CPUID: Final = _request(_READ | _WRITE, 0x05, CpuidHeader)
CREATE_VCPU: Final = _request(_NONE, 0x41)
SET_USER_MEMORY_REGION: Final = _request(_WRITE, 0x46, MemoryRegion)
SET_TSS_ADDR: Final = _request(_NONE, 0x47)
CREATE_IRQCHIP: Final = _request(_NONE, 0x60)
IRQ_LINE: Final = _request(_WRITE, 0x61, IrqLevel)
GET_IRQCHIP: Final = _request(_READ | _WRITE, 0x62, Irqchip)
SET_IRQCHIP: Final = _request(_READ, 0x63, Irqchip)
SET_GSI_ROUTING: Final = _request(_WRITE, 0x6A, RoutingHeader)
IRQFD: Final = _request(_WRITE, 0x76, Irqfd)
RUN: Final = _request(_NONE, 0x80)
SET_REGS: Final = _request(_WRITE, 0x82, Regs)
GET_SREGS: Final = _request(_READ, 0x83, Sregs)
SET_SREGS: Final = _request(_WRITE, 0x84, Sregs)
SET_SIGNAL_MASK: Final = _request(_WRITE, 0x8B, SignalMaskHeader)
SET_CPUID2: Final = _request(_WRITE, 0x90, CpuidHeader)
SET_MP_STATE: Final = _request(_WRITE, 0x99, MpState)
ENABLE_CAP: Final = _request(_WRITE, 0xA3, EnableCap)
SIGNAL_MSI: Final = _request(_WRITE, 0xA5, Msi)

# kvm_run, the page that a vCPU shares with us: offsets and layouts of what is used.
RUN_IMMEDIATE_EXIT: Final = 1
RUN_EXIT_REASON: Final = 8
RUN_UNION: Final = 32
RUN_REASON: Final = struct.Struct("=I")
RUN_IO: Final = struct.Struct("=BBHIQ")
"""direction (1 is out), size, port, count, data_offset."""
RUN_IO_OUT: Final = 1
RUN_MMIO: Final = struct.Struct("=Q8sIB")
"""phys_addr, data, len, is_write."""
RUN_MMIO_DATA: Final = RUN_UNION + 8
RUN_EOI: Final = struct.Struct("=B")
RUN_FAIL_ENTRY: Final = struct.Struct("=QI")
"""hardware_entry_failure_reason, cpu."""
RUN_INTERNAL: Final = struct.Struct("=I")
"""suberror."""
