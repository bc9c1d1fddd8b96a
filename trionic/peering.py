"""A card whose queues and packets lie in the memory of another card, which is reset in the middle.

The client has both cards in one container: what is mapped there either reaches. The first one's driver
keeps its rings and buffers in the second one's BAR 2.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

import client
from client.bar_memory import bar_memory
from client.container import open_container
from client.mapping import BarMapping
from client.pci import Command, PciControl, read_config
from client.virtio import NetDriver, open_net
from protocol.vfio import RegionIndex
from trionic._groups import ungrouped
from trionic._traffic import GRACE_S, UNDER_WAY, Frames, Traffic

__all__ = ["Peering", "peer"]

MEMORY: Final = 2 << 20
"""Bytes of the other card's memory; the driver's queues and buffers take 1.1 MiB."""

BETWEEN: Final = 256
"""Frames that come back between two resets."""


@dataclass(slots=True)
class Peering(Frames):
    """What became of the frames. `lost` are those that were under way when the other card was reset, and
    `errors` are what the driver was told then.
    """

    errors: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether no frame came back twice or early, and none was lost but by a reset."""
        return not (self.doubled or self.overtaken) and self.lost <= UNDER_WAY * len(self.errors)


async def peer(card: Path, lender: Path, resets: int) -> Peering:
    """Reset the card at `lender` so often while the one at `card` works in its memory.

    ClientError if either cannot be reached, the memory is too small or cannot be mapped, or if no frame comes
    back, at first or after a reset.
    """
    with ungrouped(client.ClientError):
        return await _peer(card, lender, resets)


async def _peer(card: Path, lender: Path, resets: int) -> Peering:
    tally = Peering()
    async with (
        client.connect(card) as session,
        client.connect(lender) as lending,
        open_container() as container,
    ):
        await container.attach(session)
        pci = PciControl(lending, await read_config(lending))
        await pci.set_command(Command.MEMORY)
        with BarMapping(lending.regions[RegionIndex.BAR2], lending.decoding) as mapping:
            async with (
                bar_memory(container, mapping, size=MEMORY) as memory,
                open_net(session, memory=memory) as nic,
            ):
                for _ in range(resets):
                    tally.errors.append(await _interrupted(nic, tally, lending))
                    await pci.set_command(Command.MEMORY)
                    await memory.entry.wait_back()
                    await nic.reset()
                async with _traffic(nic, tally) as traffic:
                    await traffic.end()
    return tally


async def _interrupted(nic: NetDriver, tally: Peering, lending: client.Session) -> str:
    """Reset the other card in the middle of traffic; what the driver says of it."""
    try:
        with ungrouped(client.ClientError):
            async with _traffic(nic, tally):
                with trio.CancelScope(shield=True):  # whoever fails must not keep it from being sent
                    await lending.reset()
                await trio.sleep(GRACE_S)
    except client.DeviceError as error:
        return str(error)
    raise client.ClientError("the driver did not hear that its memory was taken away")


@asynccontextmanager
async def _traffic(nic: NetDriver, tally: Peering) -> AsyncIterator[Traffic]:
    """Frames go round and round; some came back before the block begins."""
    traffic = Traffic(nic, tally)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(traffic.send)
        nursery.start_soon(traffic.receive)
        await traffic.wait_begun()
        if not await traffic.wait_more(BETWEEN):
            raise client.ClientError("the card fell silent")
        yield traffic
        nursery.cancel_scope.cancel()
