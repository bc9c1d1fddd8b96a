"""The device of `lvu_device.c`, which the real libvfio-user serves."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

import client
from bench._servers import Server, compiled
from tests.conftest import cannot
from tests.peers.cache import PeerError
from tests.peers.libvfio_user import libvfio_user

PATIENCE: Final = 20
"""Seconds for a test."""

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


@asynccontextmanager
async def session_with(command: str, path: Path) -> AsyncIterator[client.Session]:
    """A session with a device that `command` starts, over a socket at `path`."""
    server = Server(command, path)
    try:
        with trio.fail_after(PATIENCE):
            await trio.to_thread.run_sync(server.wait_until_listening)
            async with client.connect(path) as session:
                yield session
    finally:
        server.stop()
