"""Our numbers and layouts against the host's own <linux/kvm.h>, as its compiler sees it."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from client.kvm import _abi

REQUESTS = {
    f"KVM_{name}": getattr(_abi, name)
    for name in (
        *("GET_API_VERSION", "CREATE_VM", "CHECK_EXTENSION", "GET_VCPU_MMAP_SIZE", "GET_SUPPORTED_CPUID"),
        *("CREATE_VCPU", "SET_USER_MEMORY_REGION", "SET_TSS_ADDR", "CREATE_IRQCHIP", "IRQ_LINE"),
        *("GET_IRQCHIP", "SET_IRQCHIP", "SET_GSI_ROUTING", "IRQFD", "RUN", "SET_REGS", "GET_SREGS"),
        *(
            "SET_SREGS",
            "SET_SIGNAL_MASK",
            "SET_CPUID2",
            "SET_MP_STATE",
            "ENABLE_CAP",
            "SIGNAL_MSI",
            "API_VERSION",
        ),
    )
}
NUMBERS = {
    **{f"KVM_CAP_{cap.name}": cap for cap in _abi.Cap},
    **{f"KVM_EXIT_{reason.name}": reason for reason in _abi.ExitReason},
    **{f"KVM_IRQCHIP_{chip.name}": chip for chip in _abi.Chip},
    "KVM_IRQ_ROUTING_IRQCHIP": _abi.ROUTE_IRQCHIP,
    "KVM_IRQ_ROUTING_MSI": _abi.ROUTE_MSI,
    "KVM_IRQFD_FLAG_DEASSIGN": _abi.IRQFD_DEASSIGN,
    "KVM_IRQFD_FLAG_RESAMPLE": _abi.IRQFD_RESAMPLE,
    "KVM_MEM_READONLY": _abi.MEM_READONLY,
    "KVM_MP_STATE_RUNNABLE": _abi.MP_STATE_RUNNABLE,
    "KVM_IOAPIC_NUM_PINS": _abi.IOAPIC_PINS,
    "KVM_EXIT_IO_OUT": _abi.RUN_IO_OUT,
}
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "kvm_userspace_memory_region": _abi.MemoryRegion,
    "kvm_irq_level": _abi.IrqLevel,
    "kvm_irqfd": _abi.Irqfd,
    "kvm_irq_routing": _abi.RoutingHeader,
    "kvm_irq_routing_entry": _abi.RoutingEntry,
    "kvm_msi": _abi.Msi,
    "kvm_enable_cap": _abi.EnableCap,
    "kvm_pic_state": _abi.PicRegisters,
    "kvm_ioapic_state": _abi.IoapicRegisters,
    "kvm_irqchip": _abi.Irqchip,
    "kvm_regs": _abi.Regs,
    "kvm_mp_state": _abi.MpState,
    "kvm_segment": _abi.Segment,
    "kvm_sregs": _abi.Sregs,
    "kvm_cpuid2": _abi.CpuidHeader,
    "kvm_cpuid_entry2": _abi.CpuidEntry,
    "kvm_signal_mask": _abi.SignalMaskHeader,
}
NAMED_OTHERWISE = {("kvm_irqchip", "state"): "chip", ("kvm_sregs", "rest"): "gdt"}
RUN = {
    "immediate_exit": _abi.RUN_IMMEDIATE_EXIT,
    "exit_reason": _abi.RUN_EXIT_REASON,
    "io": _abi.RUN_UNION,
    "io.data_offset": _abi.RUN_UNION + _abi.RUN_IO.size - 8,
    "mmio.data": _abi.RUN_MMIO_DATA,
    "mmio.is_write": _abi.RUN_UNION + _abi.RUN_MMIO.size - 1,
    "eoi.vector": _abi.RUN_UNION,
    "fail_entry.cpu": _abi.RUN_UNION + _abi.RUN_FAIL_ENTRY.size - 4,
    "internal.suberror": _abi.RUN_UNION,
}


def expectations() -> dict[str, int]:
    """What we believe, by the C expression that says it."""
    believed = {name: int(number) for name, number in (REQUESTS | NUMBERS).items()}
    for name, kind in STRUCTURES.items():
        believed[f"sizeof(struct {name})"] = ctypes.sizeof(kind)
        for field in kind._fields_:
            theirs = NAMED_OTHERWISE.get((name, field[0]), field[0])
            believed[f"offsetof(struct {name}, {theirs})"] = getattr(kind, field[0]).offset
    for field_of_run, offset in RUN.items():
        believed[f"offsetof(struct kvm_run, {field_of_run})"] = offset
    return believed


def test_numbers_and_layouts_are_those_of_the_headers(
    tmp_path: Path, demand: Callable[[bool, str], None]
) -> None:
    compiler = shutil.which("cc")
    demand(compiler is not None and Path("/usr/include/linux/kvm.h").exists(), "there are no kernel headers")
    assert compiler is not None
    believed = expectations()
    prints = "".join(f'printf("%llu\\n", (unsigned long long)({expression}));' for expression in believed)
    source = tmp_path / "kvm.c"
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {{ {prints} }}\n"
    )
    program = tmp_path / "kvm"
    subprocess.run([compiler, "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert dict(zip(believed, map(int, output.split()), strict=True)) == believed
