"""Which engine speaks vfio-user for the cards: this project's own, or Nutanix's libvfio-user."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from trionic.errors import ConfigError

if TYPE_CHECKING:
    from server.libvfio_user import Library

__all__ = ["INTERFACES", "NATIVE", "Engine", "EngineConfig", "limits", "open_engine"]

INTERFACES: Final = ("2022", "2023", "2026")
"""The values of `server.libvfio_user.Generation`, here so that naming them loads nothing."""


class Engine(Enum):
    """Who reads and answers a client's messages."""

    NATIVE = "native"
    LIBVFIO_USER = "libvfio-user"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine; `ConfigError` for settings that it does not have."""

    engine: Engine = Engine.NATIVE
    library: Path | None = None
    """The file of libvfio-user; None: $TRIONIC_LIBVFIO_USER, or where the loader finds it."""
    interface: str | None = None
    """One of `INTERFACES`; None: found out from the library."""

    def __post_init__(self) -> None:
        if self.engine is Engine.NATIVE and (self.library or self.interface):
            raise ConfigError("a libvfio-user is named, but not used; add --engine libvfio-user")


NATIVE: Final = EngineConfig()
"""The engine when nothing is said."""


def open_engine(config: EngineConfig) -> Callable[..., Coroutine[Any, Any, None]]:
    """The function that serves cards by that engine, with the parameters of `server.serve`.

    Raises `server.ServerError` if the library cannot be had or is another than was said.
    """
    if config.engine is Engine.NATIVE:
        from server import serve

        return serve
    from server.libvfio_user import serve as serve_by_library

    return partial(serve_by_library, library=_library(config))


def limits(config: EngineConfig) -> Iterator[tuple[str, str, str]]:
    """What the engine cannot do that the native one can: name, what, why.

    Raises `server.ServerError` as `open_engine` does.
    """
    if config.engine is Engine.LIBVFIO_USER:
        from server.libvfio_user import limits_of

        for limit in limits_of(_library(config).generation):
            yield limit.label, limit.what, limit.why


def _library(config: EngineConfig) -> Library:
    from server.libvfio_user import Generation, Library

    return Library(config.library, Generation(config.interface) if config.interface else None)
