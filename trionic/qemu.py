"""The QEMU command line that plugs a served card into a guest."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Final

__all__ = ["OLDEST_QEMU", "attach_arguments", "attach_line"]

# vfio-user-pci came with this release.
OLDEST_QEMU: Final = "10.1"


def attach_arguments(socket: Path, memory: str = "1G") -> list[str]:
    """What a QEMU command line needs for the card at ``socket``.

    Guest memory is a shared memfd, so that QEMU can hand it to the card; without it every DMA is refused.
    """
    device = {"driver": "vfio-user-pci", "socket": {"path": str(socket.absolute()), "type": "unix"}}
    return [
        *("-m", memory),
        *("-object", f"memory-backend-memfd,id=ram,size={memory},share=on"),
        *("-machine", "q35,memory-backend=ram"),
        *("-device", json.dumps(device, separators=(",", ":"))),
    ]


def attach_line(socket: Path) -> str:
    """`attach_arguments` for a shell."""
    return shlex.join(["qemu-system-x86_64", *attach_arguments(socket)])
