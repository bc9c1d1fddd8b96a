"""One who uses a scripted function's BARs, and remembers what he was told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from client.decoding import MemoryDecoding
from tests.client.pci_device import Device, pci_device


class Follower:
    """May take its time."""

    def __init__(self, decoding: MemoryDecoding, log: list[str] | None = None, name: str = "") -> None:
        self.decoding = decoding
        self.log: list[str] = [] if log is None else log
        self.name = name
        self.go = trio.Event()
        self.go.set()
        self.go_back = trio.Event()
        self.go_back.set()
        self.error: Exception | None = None

    def zap(self) -> None:
        """Lets go."""
        assert not self.decoding.enabled, "nobody faults in behind it"
        self.log.append(f"{self.name}zap")

    async def revoke(self) -> None:
        """When `go` is set, unless `error` keeps it from that."""
        await self.go.wait()
        if self.error is not None:
            raise self.error
        self.log.append(f"{self.name}revoke")

    async def restore(self) -> None:
        """When `go_back` is set."""
        assert self.decoding.enabled, "who comes back may fault in"
        await self.go_back.wait()
        self.log.append(f"{self.name}restore")


@asynccontextmanager
async def followed(config: bytearray | None = None) -> AsyncIterator[tuple[Device, Follower]]:
    """A function with a follower, in whose log is also when the function is written to."""
    async with pci_device(config) as device:
        follower = Follower(device.session.decoding)
        device.watch = lambda: follower.log.append("write")
        with device.session.decoding.followed_by(follower):
            yield device, follower


@asynccontextmanager
async def letting_go(device: Device, follower: Follower) -> AsyncIterator[trio.Nursery]:
    """Memory is being switched off, by a task of the nursery that waits for the follower's `go`."""
    follower.go = trio.Event()
    async with trio.open_nursery() as nursery:

        async def off() -> None:
            await device.switch(memory=False)

        nursery.start_soon(off)
        await trio.testing.wait_all_tasks_blocked()
        yield nursery
