"""One mapping of a container."""

from __future__ import annotations

from errno import ENOENT
from typing import TYPE_CHECKING

import trio

from client.container.backing import Backing
from client.container.errors import ContainerError
from protocol.vfio import DmaMapFlags

if TYPE_CHECKING:
    from client.container._sources import Reach, Source


class Entry:
    """`size` bytes at `iova`, made by `Container.map`. All fields are for reading."""

    __slots__ = (
        "_changed",
        "backing",
        "dirty",
        "error",
        "flags",
        "iova",
        "losses",
        "mapped",
        "pins",
        "present",
        "reach",
        "size",
        "source",
    )

    def __init__(self, iova: int, flags: DmaMapFlags, backing: Backing, source: Source) -> None:
        self.iova = iova
        self.size = source.size
        self.flags = flags
        self.backing = backing
        self.present = False
        """Whether devices reach it: not while its BAR is revoked."""
        self.mapped = False
        """Whether it is in the container: not before `map` returns it, and not after `unmap`."""
        self.error: ContainerError | None = None
        """Why it did not come back when its BAR did; devices do not reach it then."""
        self.losses = 0
        """How often it was revoked."""
        self.pins: dict[int, int] = {}
        """How often each page is pinned, by its number in this mapping."""
        self.dirty: set[int] = set()
        """Pages that were pinned since the last report."""
        self.source = source
        self.reach: Reach | None = None
        """Where the backing is, if devices were given it."""
        self._changed = trio.Event()

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.iova + self.size

    async def wait_gone(self) -> None:
        """Return when devices do not reach it, or did not for a while since this was called."""
        losses = self.losses
        while self.present and self.losses == losses:
            await self._changed.wait()
        await trio.lowlevel.checkpoint()

    async def wait_back(self) -> None:
        """Return when devices reach it. Raises what `error` has where it could not come back, and
        ContainerError(ENOENT) if it was unmapped.
        """
        while not self.present:
            if self.error is not None:
                raise self.error.with_traceback(None)
            if not self.mapped:
                raise ContainerError(ENOENT, f"the mapping at {self.iova:#x} is gone")
            await self._changed.wait()
        await trio.lowlevel.checkpoint()

    def change(
        self, *, present: bool | None = None, mapped: bool | None = None, error: ContainerError | None = None
    ) -> None:
        """The container's: whoever waits looks again."""
        if present is not None:
            self.losses += self.present and not present
            self.present = present
        if mapped is not None:
            self.mapped = mapped
        self.error = error
        changed, self._changed = self._changed, trio.Event()
        changed.set()
