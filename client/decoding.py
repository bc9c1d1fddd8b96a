"""Whether a device answers at its BARs, and who must let go of them before it stops to.

The kernel's vfio-pci takes every mapping of a device's BARs away before memory decoding is switched off, by
COMMAND, a power state or a reset, lets nobody fault them in until it is on again, and waits for those who do
DMA there (drivers/vfio/pci/vfio_pci_config.c, vfio_pci_core.c, vfio_pci_dmabuf.c). vfio-user's server cannot:
so the client does it for itself, in the same order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import trio

from client.errors import DeviceError, ServerError
from client.pci import CapabilityEntry, CapabilityId, Command, ConfigSpace, read_config

if TYPE_CHECKING:
    from client.session import Session

T = TypeVar("T")

COMMAND: Final = 0x04
"""Offset of the command register; MEMORY is in its first byte."""

D0: Final = 0
POWER_STATE: Final = 0b11
"""Bits of the first byte of the power management capability's control, at 4 (PM 1.2, 3.2.4)."""

FLR: Final = 0x80
"""Bit of the second byte of PCI Express device control, at 8 (PCIe 6, 7.5.3.4)."""

AF_FLR: Final = 0x01
"""Bit of the control byte of the advanced features capability, at 4 (PCI AF ECN)."""


class Follower(Protocol):
    """Somebody who uses a device's BARs without messages."""

    def zap(self) -> None:
        """Let go at once: whoever touches the BARs through this finds all ones until it is enabled again.
        Also called when the session ends, for good.
        """

    async def revoke(self) -> None:
        """Return when nobody uses them any more. Called after every zap but that of the session's end; a
        caller that gives up is free to come again, and nothing is forgotten by that.
        """

    async def restore(self) -> None:
        """The device answers again: those that were revoked may come back. Raises nothing."""


@dataclass(frozen=True, slots=True)
class _State:
    """What this session's writes came to."""

    memory: bool = True
    powered: bool = True
    alive: bool = True


Change = Callable[[_State], _State]


class MemoryDecoding:
    """One session's. Until a write or a reset of this session says otherwise, the device is taken to answer:
    others may have enabled it, and many a device without a driver never asks.
    """

    def __init__(self, session: Session) -> None:
        self.command_memory = True
        """Whether COMMAND.MEMORY counts; it does not at a virtual function of SR-IOV (PCIe 6, 9.3.4.1.3)."""
        self._session = session
        self._state = _State()
        self._away = False
        """Followers were told to let go, and the write or reset that this was for has not left yet, or its
        caller gave up before it did.
        """
        self._out = False
        """Followers were told to let go and not yet that they may come back."""
        self._followers: list[Follower] = []
        self._changing = trio.Lock()
        self._capabilities: tuple[CapabilityEntry, ...] | None = None

    @property
    def enabled(self) -> bool:
        """Whether BARs may be faulted in."""
        return not self._away and self._answers(self._state)

    def _answers(self, state: _State) -> bool:
        return state.alive and state.powered and (state.memory or not self.command_memory)

    @contextmanager
    def followed_by(self, follower: Follower) -> Iterator[None]:
        """Tell `follower` until the block ends."""
        self._followers.append(follower)
        try:
            yield
        finally:
            self._followers.remove(follower)

    async def around_write(self, offset: int, data: bytes, write: Callable[[], Awaitable[T]]) -> T:
        """Call `write`, which writes `data` to configuration space, with everybody out of the BARs first if
        it takes them away; raises what it raises.
        """
        changes = await self._changes(offset, data)
        return await self._around(changes, write) if changes else await write()

    async def around_reset(self, reset: Callable[[], Awaitable[T]]) -> T:
        """The same around DEVICE_RESET."""
        return await self._around([_reset], reset)

    async def _changes(self, offset: int, data: bytes) -> list[Change]:
        """What a write does to the decoding of memory, if anything."""
        changes: list[Change] = []
        if (low := _byte(offset, data, COMMAND)) is not None:
            memory = bool(low & Command.MEMORY)
            changes.append(partial(replace, memory=memory))
        if offset + len(data) <= 0x40:
            return changes
        for capability in await self._known_capabilities():
            start = capability.offset
            if capability.id == CapabilityId.PM and (control := _byte(offset, data, start + 4)) is not None:
                powered = control & POWER_STATE == D0
                changes.append(partial(replace, powered=powered))
            elif capability.id == CapabilityId.PCIE:
                if (_byte(offset, data, start + 9) or 0) & FLR:
                    changes.append(_reset)
            elif capability.id == CapabilityId.AF and (_byte(offset, data, start + 4) or 0) & AF_FLR:
                changes.append(_reset)
        return changes

    def learn(self, config: ConfigSpace) -> None:
        """Where the capabilities are, from a snapshot that somebody took; a list that makes no sense switches
        nothing off.
        """
        try:
            self._capabilities = config.capabilities
        except DeviceError:
            self._capabilities = ()

    async def _known_capabilities(self) -> tuple[CapabilityEntry, ...]:
        if self._capabilities is None:
            await read_config(self._session)  # which calls `learn`
        return self._capabilities or ()

    async def _around(self, changes: list[Change], do: Callable[[], Awaitable[T]]) -> T:
        async with self._changing:
            before = after = self._state
            for change in changes:
                after = change(after)
            if _reset in changes or not self._answers(after):
                self._away = self._out = True
                self._zap()
                async with trio.open_nursery() as nursery:
                    for follower in self._followers:
                        nursery.start_soon(follower.revoke)
            try:
                result = await do()
            except ServerError:
                self._settle(before)
                await self._restore()
                raise
            except BaseException:
                self._settle(after)
                raise
            self._settle(after)
            await self._restore()
            return result

    def _settle(self, state: _State) -> None:
        self._state = replace(state, alive=self._state.alive)
        self._away = False

    async def _restore(self) -> None:
        """Let followers come back, if the device answers; one that gives up here leaves it to the next."""
        if self.enabled and self._out:
            async with trio.open_nursery() as nursery:
                for follower in self._followers:
                    nursery.start_soon(follower.restore)
            self._out = False

    def _zap(self) -> None:
        for follower in tuple(self._followers):
            follower.zap()

    def end(self) -> None:
        """The session is over, and with it every right to the device's memory."""
        self._state = replace(self._state, alive=False)
        self._zap()


def _byte(offset: int, data: bytes, at: int) -> int | None:
    """The byte that a write leaves at `at`, None if it does not reach there."""
    return data[at - offset] if offset <= at < offset + len(data) else None


def _reset(state: _State) -> _State:
    """A reset leaves D0 and an empty COMMAND."""
    return replace(state, memory=False, powered=True)
