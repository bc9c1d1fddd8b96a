"""Gives mappings to devices and takes them back: to and from all, or none."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from errno import EAGAIN

import trio

from client.container._device import Device
from client.container._jobs import Jobs
from client.container.entry import Entry
from client.container.errors import ContainerError
from client.container.limits import AT_ONCE, FAULT_TRIES, LockedMemory
from client.session import Session

log = logging.getLogger(__name__)


class Placing:
    """One container's; whoever calls it has the container's lock."""

    def __init__(self, locked: LockedMemory, jobs: Jobs) -> None:
        self.devices: dict[Session, Device] = {}
        """Those that are attached."""
        self._locked = locked
        self._jobs = jobs

    async def part(self, device: Device) -> None:
        """Take everything back from a device; what it does not give is told when all was tried. A BAR it must
        give: nobody would ask again when that vanishes.
        """
        refusal: ContainerError | None = None
        for iova in device.held:
            try:
                await device.let_go_for_good(iova)
            except ContainerError as error:
                refusal = refusal or error
        del self.devices[device.session]
        self._locked.attached = bool(self.devices)
        if refusal is not None:
            raise refusal

    async def place(self, entry: Entry) -> None:
        """Give it to every device, as it is when the last of them has answered; or to none."""
        for _ in range(FAULT_TRIES):
            try:
                reach = entry.reach = entry.source.reach(entry.flags)
                for device in tuple(self.devices.values()):
                    if entry.source.current(reach):  # else its descriptor may be another file's by now
                        await device.take(entry.iova, entry.size, reach, entry.flags)
            except BaseException:
                await self._undo(entry)
                raise
            if entry.source.current(reach):
                entry.change(present=True)
                return
            await self._undo(entry)
        raise ContainerError(EAGAIN, "the BAR comes and goes all the time")

    async def _undo(self, entry: Entry) -> None:
        """No device may keep what nobody asks for again, or what is about to vanish."""
        with self._jobs.shielded():
            await self.displace(entry, must=entry.source.memory is None)
            for device in self.devices.values():
                device.disown(entry.iova)

    async def displace(self, entry: Entry, *, must: bool = False) -> ContainerError | None:
        """Take it back from every device; from all but those that refuse, whose refusal is returned, unless
        they `must`.
        """
        refusal: ContainerError | None = None
        try:
            for device in tuple(self.devices.values()):
                try:
                    await (device.must_let_go if must else device.let_go)(entry.iova)
                except ContainerError as error:
                    log.warning("at %#x: %s", entry.iova, error)
                    refusal = error
        finally:
            entry.source.leave()
            entry.reach = None
            entry.change(present=False)
        return refusal

    async def displace_all(self, entries: Sequence[Entry], *, must: bool = False) -> list[ContainerError]:
        """The same for many, some of them at the same time; what was refused."""
        refusals: list[ContainerError] = []

        async def displace(entry: Entry) -> None:
            if (refusal := await self.displace(entry, must=must)) is not None:
                refusals.append(refusal)

        await _some_at_once(displace, entries)
        return refusals

    async def bring_back(self, entry: Entry) -> None:
        """Give it to every device again; one that cannot come back says so."""
        try:
            await self.place(entry)
        except ContainerError as error:
            failure = ContainerError(error.errno, f"what was mapped at {entry.iova:#x} does not come back")
            log.warning("%s: %s", failure, error)
            entry.change(error=failure)

    async def bring_all_back(self, entries: Sequence[Entry]) -> None:
        """The same for many, some of them at the same time."""
        await _some_at_once(self.bring_back, entries)


async def _some_at_once(do: Callable[[Entry], Awaitable[None]], entries: Sequence[Entry]) -> None:
    for start in range(0, len(entries), AT_ONCE):
        async with trio.open_nursery() as nursery:
            for entry in entries[start : start + AT_ONCE]:
                nursery.start_soon(do, entry)
