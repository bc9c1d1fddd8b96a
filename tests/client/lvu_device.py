"""The device of `lvu_device.c`, which the real libvfio-user serves."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from bench._servers import compiled
from tests.conftest import cannot
from tests.peers.cache import PeerError
from tests.peers.libvfio_user import libvfio_user

TRIGGER: Final = 0x14
TRIGGERED: Final = 0x18
"""Registers of BAR0: a write to the one triggers INTx so often, the other counts."""

RESETS: Final = 0x1C
"""Counts resets."""

PM: Final = 0x40
PCIE: Final = 0x50
"""Offsets of its capabilities."""


def lvu_device() -> str:
    """How to start it; building it needs Debian's archive once."""
    source = Path(__file__).with_suffix(".c")
    try:
        program = compiled(source.stem, source, libvfio_user().compile_flags)
    except PeerError as error:
        cannot(f"libvfio-user cannot be had here: {error}")
    return f"{shlex.quote(str(program))} {{socket}}"
