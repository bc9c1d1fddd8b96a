"""QEMU's command line: the machine that guests are, its serial ports and its cards."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.guest._root import Root


@dataclass(frozen=True)
class Card:
    """A vfio-user device to plug into a guest."""

    socket: Path | str
    id: str | None = None
    """QEMU's name for it, for ``device_del``; by default ``card0``, ``card1`` and so on."""
    root_port: bool = False
    """Whether it sits behind a PCIe root port of its own, so that a running guest can lose it."""
    options: dict[str, Any] = field(default_factory=dict)
    """More properties of QEMU's device, such as ``{"x-no-posted-writes": True}``."""


def card_arguments(sockets: Sequence[Path | str | Card]) -> list[str]:
    """QEMU's arguments that plug these cards in."""
    arguments = []
    for number, given in enumerate(sockets):
        card = given if isinstance(given, Card) else Card(given)
        name = card.id or f"card{number}"
        device: dict[str, Any] = {
            "driver": "vfio-user-pci",
            "id": name,
            "socket": {"type": "unix", "path": os.fspath(card.socket)},
            **card.options,
        }
        if card.root_port:
            port = {"driver": "pcie-root-port", "id": f"{name}-port", "chassis": 16 + number, "slot": number}
            arguments += ["-device", json.dumps(port)]
            device["bus"] = port["id"]
        arguments += ["-device", json.dumps(device)]
    return arguments


def tap_arguments(taps: Sequence[str]) -> list[str]:
    """QEMU's arguments for its own virtio network cards on these TAP devices: what to compare with."""
    arguments = []
    for number, tap in enumerate(taps):
        arguments += ["-netdev", f"tap,id=tap{number},ifname={tap},script=no,downscript=no,vhost=off"]
        nic = {"driver": "virtio-net-pci", "id": f"nic{number}", "netdev": f"tap{number}", "romfile": ""}
        arguments += ["-device", json.dumps(nic)]
    return arguments


_IOMMU_ON = " intel_iommu=on"


def iommu_arguments(accel: str) -> list[str]:
    """QEMU's arguments for a virtual IOMMU that tells the cards' servers of each mapping."""
    arguments = ["-device", "intel-iommu,intremap=on,caching-mode=on"]
    if accel == "kvm":
        arguments += ["-M", "kernel-irqchip=split"]  # the IOMMU remaps interrupts
    return arguments


def machine_arguments(
    root: Root,
    *,
    accel: str,
    smp: int,
    memory: str,
    kernel_args: str,
    shared: bool = True,
    iommu: bool = False,
    initrd: Path | None = None,
) -> list[str]:
    """QEMU's arguments for the machine that every guest is, without its serial ports and cards.

    `initrd` takes the place of the root's own initramfs; `iommu` is `tests.guest.boot`'s.
    """
    arch = root.arch
    backend = f"memory-backend-memfd,id=ram,size={memory},share=on"
    if not shared:
        backend = f"memory-backend-ram,id=ram,size={memory}"
    return [
        *("-no-user-config", "-nodefaults", "-display", "none", "-nic", "none"),
        *("-M", f"{arch.machine},accel={accel},memory-backend=ram", "-cpu", arch.cpu),
        *("-smp", str(smp), "-m", memory, "-object", backend, *arch.qemu_args),
        *("-kernel", str(root.kernel), "-initrd", str(initrd or root.initramfs)),
        *("-append", f"console={arch.console} panic=-1 {arch.kernel_args} {kernel_args}{_IOMMU_ON * iommu}"),
        *(iommu_arguments(accel) if iommu else ()),
    ]


def serial_arguments(fds: Sequence[int]) -> list[str]:
    """QEMU's arguments that put its monitor and the guest's serial ports on inherited sockets."""
    monitor, channel, console, output = (f"chr{number}" for number in range(4))
    return [
        *(part for n, fd in enumerate(fds) for part in ("-chardev", f"socket,id=chr{n},fd={fd}")),
        *("-object", f"monitor-qmp,id=qmp,chardev={monitor}"),
        *(part for chardev in (console, channel, output) for part in ("-serial", f"chardev:{chardev}")),
    ]
