"""A PCI network card made of Python, served over vfio-user.

    async with trionic.connect("/tmp/card.sock") as session: ...    # the host's side
    await trionic.serve([(nic.function, Path("/tmp/card.sock"))])    # the card's side

What users import stands here. Each name is loaded when it is first used, so that the command starts fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trionic._rooms import check_rooms, version

check_rooms()

if TYPE_CHECKING:
    from client import BarMapping, DeviceError, connect, dma_memory, err, intx, msi, msix, req
    from client.bar_memory import bar_memory
    from client.container import BarRange, Container, ContainerError, Mode, PageMemory, open_container
    from client.dmabuf import exported_bar
    from client.irqchip import InterruptController, IntxMode, IntxRoute, open_intx
    from client.irqchip.processor import open_processor
    from client.irqchip.userspace import open_ioapic, open_pic
    from client.pci import Command, PciControl, read_config
    from client.virtio import NetDriver, Slot, Wiring, open_net
    from device.function import PciFunction
    from firmware import Nic
    from firmware.ports import PortError, open_port
    from protocol.vfio import RegionIndex
    from server import Release, ServerError, serve
    from trionic.config import CardConfig, ServeConfig, load_config
    from trionic.errors import ConfigError, TrionicError
    from trionic.serving import serve_cards

    __version__: str

__all__ = [
    "BarMapping",
    "BarRange",
    "CardConfig",
    "Command",
    "ConfigError",
    "Container",
    "ContainerError",
    "DeviceError",
    "InterruptController",
    "IntxMode",
    "IntxRoute",
    "Mode",
    "NetDriver",
    "Nic",
    "PageMemory",
    "PciControl",
    "PciFunction",
    "PortError",
    "RegionIndex",
    "Release",
    "ServeConfig",
    "ServerError",
    "Slot",
    "TrionicError",
    "Wiring",
    "bar_memory",
    "connect",
    "dma_memory",
    "err",
    "exported_bar",
    "intx",
    "load_config",
    "msi",
    "msix",
    "open_container",
    "open_intx",
    "open_ioapic",
    "open_net",
    "open_pic",
    "open_port",
    "open_processor",
    "read_config",
    "req",
    "serve",
    "serve_cards",
]

_HOMES = {
    "BarMapping": "client",
    "BarRange": "client.container",
    "CardConfig": "trionic.config",
    "Command": "client.pci",
    "ConfigError": "trionic.errors",
    "Container": "client.container",
    "ContainerError": "client.container",
    "DeviceError": "client",
    "InterruptController": "client.irqchip",
    "IntxMode": "client.irqchip",
    "IntxRoute": "client.irqchip",
    "Mode": "client.container",
    "NetDriver": "client.virtio",
    "Nic": "firmware",
    "PageMemory": "client.container",
    "PciControl": "client.pci",
    "PciFunction": "device.function",
    "PortError": "firmware.ports",
    "RegionIndex": "protocol.vfio",
    "Release": "server",
    "ServeConfig": "trionic.config",
    "ServerError": "server",
    "Slot": "client.virtio",
    "TrionicError": "trionic.errors",
    "Wiring": "client.virtio",
    "bar_memory": "client.bar_memory",
    "connect": "client",
    "dma_memory": "client",
    "err": "client",
    "exported_bar": "client.dmabuf",
    "intx": "client",
    "load_config": "trionic.config",
    "msi": "client",
    "msix": "client",
    "open_container": "client.container",
    "open_intx": "client.irqchip",
    "open_ioapic": "client.irqchip.userspace",
    "open_net": "client.virtio",
    "open_pic": "client.irqchip.userspace",
    "open_port": "firmware.ports",
    "open_processor": "client.irqchip.processor",
    "read_config": "client.pci",
    "req": "client",
    "serve": "server",
    "serve_cards": "trionic.serving",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
