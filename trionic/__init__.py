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
    from client import connect, dma_memory, err, intx, msi, msix, req
    from client.irqchip import InterruptController, IntxMode, IntxRoute, open_intx
    from client.irqchip.processor import open_processor
    from client.irqchip.userspace import open_ioapic, open_pic
    from client.pci import read_config
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
    "CardConfig",
    "ConfigError",
    "InterruptController",
    "IntxMode",
    "IntxRoute",
    "NetDriver",
    "Nic",
    "PciFunction",
    "PortError",
    "RegionIndex",
    "Release",
    "ServeConfig",
    "ServerError",
    "Slot",
    "TrionicError",
    "Wiring",
    "connect",
    "dma_memory",
    "err",
    "intx",
    "load_config",
    "msi",
    "msix",
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
    "CardConfig": "trionic.config",
    "ConfigError": "trionic.errors",
    "InterruptController": "client.irqchip",
    "IntxMode": "client.irqchip",
    "IntxRoute": "client.irqchip",
    "NetDriver": "client.virtio",
    "Nic": "firmware",
    "PciFunction": "device.function",
    "PortError": "firmware.ports",
    "RegionIndex": "protocol.vfio",
    "Release": "server",
    "ServeConfig": "trionic.config",
    "ServerError": "server",
    "Slot": "client.virtio",
    "TrionicError": "trionic.errors",
    "Wiring": "client.virtio",
    "connect": "client",
    "dma_memory": "client",
    "err": "client",
    "intx": "client",
    "load_config": "trionic.config",
    "msi": "client",
    "msix": "client",
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
