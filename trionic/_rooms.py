"""Are the packages beside this one ours? Their names are common: a user's own file may hide one of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

__all__ = ["ROOMS", "check_rooms", "version"]

ROOMS: Final = ("device", "firmware", "protocol", "server", "client", "conformance")

_HOME: Final = Path(__file__).parent.parent


def check_rooms() -> None:
    """Raise one clear ImportError if another package or module stands in the place of one of ours."""
    for room in ROOMS:
        found = _location(room)
        if found is None:
            raise ImportError(
                f"trionic needs its package {room!r} beside it in {_HOME}; install trionic again"
            )
        if found != _HOME / room:
            raise ImportError(
                f"trionic needs its own package {room!r}, but Python finds {found}, which hides it;"
                " rename that file or take its folder off the module search path"
            )


def version() -> str:
    """The installed version."""
    from importlib import metadata

    try:
        return metadata.version("trionic")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _location(room: str) -> Path | None:
    """The folder of package ``room`` as an import would find it, or the file of a plain module."""
    try:
        spec = importlib.util.find_spec(room)
    except ValueError:  # somebody put a module without a spec into sys.modules
        spec = None
    if spec is None:
        return None
    if spec.submodule_search_locations is None:
        return Path(spec.origin) if spec.origin else Path(room)
    locations = [Path(location) for location in spec.submodule_search_locations]
    return _HOME / room if _HOME / room in locations else locations[0] if locations else None
