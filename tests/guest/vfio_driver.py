"""The program of ``programs/vfio_driver.c``: a driver in user space, in a guest whose own kernel gives it our
cards behind a virtual IOMMU.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench._servers import compiled

PROGRAM: Final = "vfio_driver"

IOMMU: Final = ("-device", "intel-iommu,intremap=on,caching-mode=on")
"""QEMU's arguments for a virtual IOMMU that tells the cards' clients of each mapping."""

KERNEL_ARGS: Final = "quiet intel_iommu=on"

# Where the program is, and its function for the guest's nth card, which vfio-pci has from then on.
TAKE: Final = f"""
modprobe vfio-pci
modprobe vfio_iommu_type1
install -m 755 /run/files/{PROGRAM} /bin/{PROGRAM}
take() {{
    taken=$(card $1)
    echo vfio-pci > $taken/driver_override
    if [ -e $taken/driver ]; then echo ${{taken##*/}} > $taken/driver/unbind; fi
    echo ${{taken##*/}} > /sys/bus/pci/drivers_probe
    taken=${{taken##*/}}
}}
"""

_STEP: Final = re.compile(r"^step (\S+) (ok|fail) (.*)$", re.MULTILINE)


def build() -> Path:
    """The program, which needs nothing of the guest but its kernel; PeerError if it cannot be built."""
    source = Path(__file__).parent / "programs" / f"{PROGRAM}.c"
    return compiled(PROGRAM, source, ["-static"])


def iommu_arguments(accel: str) -> list[str]:
    """QEMU's arguments for a guest with a virtual IOMMU. It remaps interrupts, which KVM leaves to QEMU only
    with a split irqchip.
    """
    return [*IOMMU, *(["-M", "kernel-irqchip=split"] if accel == "kvm" else [])]


@dataclass(frozen=True, slots=True)
class Step:
    """A line of the program."""

    name: str
    good: bool
    detail: str


def read_steps(output: str) -> list[Step]:
    """What the program did, in its order."""
    return [Step(name, verdict == "ok", detail.strip()) for name, verdict, detail in _STEP.findall(output)]
