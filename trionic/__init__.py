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
    from client import connect
    from device.function import PciFunction
    from firmware import Nic
    from firmware.ports import PortError, open_port
    from server import ServerError, serve
    from trionic.config import CardConfig, ServeConfig, load_config
    from trionic.errors import ConfigError, TrionicError
    from trionic.serving import serve_cards

    __version__: str

__all__ = [
    "CardConfig",
    "ConfigError",
    "Nic",
    "PciFunction",
    "PortError",
    "ServeConfig",
    "ServerError",
    "TrionicError",
    "connect",
    "load_config",
    "open_port",
    "serve",
    "serve_cards",
]

_HOMES = {
    "CardConfig": "trionic.config",
    "ConfigError": "trionic.errors",
    "Nic": "firmware",
    "PciFunction": "device.function",
    "PortError": "firmware.ports",
    "ServeConfig": "trionic.config",
    "ServerError": "server",
    "TrionicError": "trionic.errors",
    "connect": "client",
    "load_config": "trionic.config",
    "open_port": "firmware.ports",
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
