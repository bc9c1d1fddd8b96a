"""A real card behind the native server, in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from device.revocation import Revocation
from firmware import Nic
from firmware.ports import open_port
from server import serve

BAR2 = 1 << 20


@asynccontextmanager
async def served_card(path: Path, *, revocation: Revocation = Revocation.COOPERATIVE) -> AsyncIterator[Nic]:
    """A network card at `path`."""
    nic = Nic(open_port("loopback"), name="card", bar2_size=BAR2, revocation=revocation)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nic.run)
            await nursery.start(serve, [(nic.function, path)])
            yield nic
            nursery.cancel_scope.cancel()
    finally:
        nic.close()
