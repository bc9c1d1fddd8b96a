"""The architectures that guests may have, as data: what differs between them and nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arch:
    """An architecture: its Debian packages, the QEMU that emulates it and the machine that its guests are."""

    debian: str
    """Debian's name of the architecture."""
    triplet: str
    """The directory below ``usr/lib`` that has its libraries."""
    loader: str
    """The dynamic loader that its programs name, below the root directory."""
    kernel: str
    """Debian's name of the kernel's flavour, which its packages' names end in."""
    qemu: str
    """QEMU's program."""
    qemu_package: str
    machine: str
    """QEMU's machine with its properties."""
    cpu: str
    console: str
    """The kernel's name of the first serial port, with its speed where it has one."""
    kernel_args: str = ""
    """What its kernel needs on the command line."""
    qemu_args: tuple[str, ...] = ()
    """What its QEMU needs beside the machine."""


X86_64 = Arch(
    debian="amd64",
    triplet="x86_64-linux-gnu",
    loader="usr/lib64/ld-linux-x86-64.so.2",
    kernel="amd64",
    qemu="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    machine="q35",
    cpu="max",
    console="ttyS0,115200",
    # Emulated timers run late on a busy host, which the kernel must not take for broken wiring.
    kernel_args="no_timer_check",
)

PPC64 = Arch(
    debian="ppc64el",
    triplet="powerpc64le-linux-gnu",
    loader="usr/lib64/ld64.so.2",
    kernel="powerpc64le",
    qemu="qemu-system-ppc64",
    qemu_package="qemu-system-ppc",
    # The mitigations that QEMU would offer by default need a real processor; it warns without one.
    machine="pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off",
    cpu="power9",
    console="hvc0",
    # The guest clears its whole DMA window at boot, page by page and one message to each card for every page.
    qemu_args=("-global", "spapr-pci-host-bridge.dma_win_size=0x1000000"),
)

ARCHES = (X86_64, PPC64)
HOST = X86_64
"""The architecture of the hosts that the rig runs on: that of QEMU itself and of the tools."""
