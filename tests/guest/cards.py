"""Cards for guests: each served in this process, so that a test can look into it while a guest uses it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from device.profiles import Profile
from device.virtio.net import LinkStatus
from firmware import Nic
from firmware.ports import open_port
from trionic.engines import NATIVE, EngineConfig, open_engine

MAC = "52:54:00:12:34:%02x"


@dataclass(frozen=True, slots=True)
class ServedCard:
    """A card that waits for QEMU at `socket`."""

    nic: Nic
    socket: Path
    mac: str

    @property
    def counters(self) -> dict[str, int]:
        return self.nic.datapath.counters()

    @property
    def link_is_up(self) -> bool:
        return bool(self.nic.config.status & LinkStatus.LINK_UP)


@asynccontextmanager
async def serve_cards(
    folder: Path,
    ports: Sequence[str],
    engine: EngineConfig = NATIVE,
    *,
    profiles: Sequence[Profile] = (),
    **options: Any,
) -> AsyncIterator[list[ServedCard]]:
    """Serve a card on each of `ports` at sockets in `folder`; `options` are those of `Nic`.

    `profiles` are one for each card, if given.
    """
    serve = open_engine(engine)
    cards = []
    for number, spec in enumerate(ports):
        if profiles:
            options["profile"] = profiles[number]
        mac = MAC % number
        nic = Nic(open_port(spec), name=f"card{number}", mac=bytes.fromhex(mac.replace(":", "")), **options)
        cards.append(ServedCard(nic, folder / f"card{number}.sock", mac))
    try:
        async with trio.open_nursery() as nursery:
            for card in cards:
                nursery.start_soon(card.nic.run)
            await nursery.start(serve, [(card.nic.function, card.socket) for card in cards])
            yield cards
            nursery.cancel_scope.cancel()
    finally:
        for card in cards:
            card.nic.close()
