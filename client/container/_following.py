"""Hears when BARs that a container has mapped are about to vanish, once for each device that they are of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import ExitStack

from client.container.entry import Entry
from client.decoding import MemoryDecoding

Told = Callable[[Collection[Entry]], Awaitable[None]]


class Following:
    """Calls `zapped` at once, `revoke` and `restore` as a follower does, each with the mappings concerned."""

    def __init__(self, zapped: Callable[[Collection[Entry]], None], revoke: Told, restore: Told) -> None:
        self.zapped = zapped
        self.revoke = revoke
        self.restore = restore
        self._followers: dict[MemoryDecoding, _Follower] = {}

    def add(self, decoding: MemoryDecoding, entry: Entry) -> None:
        """There is a mapping of that device's BARs."""
        follower = self._followers.get(decoding)
        if follower is None:
            follower = self._followers[decoding] = _Follower(self)
            follower.following.enter_context(decoding.followed_by(follower))
        follower.entries[entry] = None

    def remove(self, decoding: MemoryDecoding, entry: Entry) -> None:
        """There no longer is."""
        follower = self._followers[decoding]
        del follower.entries[entry]
        if not follower.entries:
            del self._followers[decoding]
            follower.following.close()


class _Follower:
    def __init__(self, following: Following) -> None:
        self.entries: dict[Entry, None] = {}
        self.following = ExitStack()
        self._told = following

    def zap(self) -> None:
        self._told.zapped(tuple(self.entries))

    async def revoke(self) -> None:
        await self._told.revoke(tuple(self.entries))

    async def restore(self) -> None:
        await self._told.restore(tuple(self.entries))
