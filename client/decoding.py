"""Whether a device answers at its BARs, and who must let go of them before it stops to.

The kernel's vfio-pci takes every mapping of a device's BARs away before memory decoding is switched off, by
COMMAND, a power state or a reset, lets nobody fault them in until it is on again, and waits for those who do
DMA there (drivers/vfio/pci/vfio_pci_config.c, vfio_pci_core.c, vfio_pci_dmabuf.c). vfio-user's server cannot:
so the client does it for itself, in the same order.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeVar

import trio

from client.errors import BadReplyError, ClientError, DeviceError, ServerError
from client.pci import HEADER_SIZE, CapabilityEntry, CapabilityId, Command, ConfigSpace, read_config
from protocol import LocalProtocolError

if TYPE_CHECKING:
    from client.session import Session

T = TypeVar("T")

COMMAND: Final = 0x04
"""Offset of the command register; MEMORY is in its first byte."""

POWER_STATE: Final = 0b11
"""Bits of the first byte of the power management capability's control, at 4 (PM 1.2, 3.2.4)."""

D3_HOT: Final = 3
"""From here on the kernel takes a device not to answer; one without D1 and D2 stays in D0 instead of them."""

NO_SOFT_RESET: Final = 1 << 3
"""A bit next to them: the way back from D3hot to D0 is no reset."""

HAS_FLR: Final = 0x10
"""Bit of the fourth byte of PCI Express device capabilities, at 7 (PCIe 6, 7.5.3.3): FLR is understood."""

FLR: Final = 0x80
"""Bit of the second byte of PCI Express device control, at 9 (7.5.3.4)."""

AF_HAS_FLR: Final = 0x02
AF_FLR: Final = 0x01
"""Bits of the advanced features capability: of what it can, at 3, and of its control, at 4 (PCI AF ECN)."""


class Follower(Protocol):
    """Somebody who uses a device's BARs without messages."""

    def zap(self) -> None:
        """Let go at once: whoever touches the BARs through this finds all ones until it is enabled again.
        Also called when the session ends, for good. Raises nothing.
        """

    async def revoke(self) -> None:
        """Return when nobody uses them any more. Called after every zap but that of the session's end; must
        neither write what changes the decoding nor reset. May be cancelled, and called again then: nothing is
        forgotten by that. What it raises keeps the device from being switched off, until it is tried again.
        """

    async def restore(self) -> None:
        """The device answers again: those that were revoked may come back. May be cancelled, and called
        again then, or without a revocation before. Raises nothing.
        """


@dataclass(frozen=True, slots=True)
class _State:
    """What this session's writes came to."""

    memory: bool = True
    powered: bool = True


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
        self._alive = True
        self._taken = False  # followers were told to let go, and not yet that they may come back
        self._owed = False  # some have not come back
        self._followers: list[Follower] = []
        self._changing = trio.Lock()
        self._capabilities: tuple[CapabilityEntry, ...] | None = None

    @property
    def enabled(self) -> bool:
        """Whether BARs may be faulted in."""
        return self._alive and not self._taken and self._answers(self._state)

    def _answers(self, state: _State) -> bool:
        return state.powered and (state.memory or not self.command_memory)

    @contextmanager
    def followed_by(self, follower: Follower) -> Iterator[None]:
        """Tell `follower` until the block ends."""
        self._followers.append(follower)
        try:
            yield
        finally:
            self._followers.remove(follower)

    # what changes it

    async def around_write(
        self, offset: int, data: bytes, write: Callable[[], Awaitable[T]], *, whole: bool = True
    ) -> T:
        """Call `write`, which writes `data` to configuration space, with everybody out of the BARs first if
        it takes them away. Raises what it raises, or what keeps somebody from letting go: an ExceptionGroup
        if there is more than one reason.

        A write that is given up, or whose answer makes no sense, may have been done or not: nobody comes back
        until a later one succeeds. One that the server refuses was not done, if it is `whole`: one message.
        """
        changes = _changes(offset, data, await self._known_capabilities(offset, data))
        if not changes:
            return await write()
        return await self._around(changes, write, refusable=whole)

    async def around_reset(self, reset: Callable[[], Awaitable[T]]) -> T:
        """The same around DEVICE_RESET."""
        return await self._around([_reset], reset, refusable=True)

    def check_posted(self, offset: int, data: bytes) -> None:
        """`data` is about to be written to configuration space without waiting. Raises ClientError if that
        switches BARs which are in use, or being switched: somebody would have to be waited for, or told.
        """
        capabilities = self._capabilities
        if capabilities is None:
            if self._followers and offset + len(data) > HEADER_SIZE:
                raise ClientError(
                    "a posted write to capabilities that nobody has read, while the BARs are in use"
                )
            capabilities = ()
        changes = _changes(offset, data, capabilities)
        if not changes:
            return
        after = _apply(changes, self._state)
        if self._changing.locked() or (
            self._followers and (_reset in changes or self._taken is self._answers(after))
        ):
            raise ClientError("a posted write must not switch the BARs while they are in use: wait for it")
        self._state = after
        if not self._followers:  # whoever follows later finds them so, and comes back as others do
            self._taken = self._owed = not self._answers(after)

    async def _around(self, changes: list[Change], do: Callable[[], Awaitable[T]], *, refusable: bool) -> T:
        async with self._changing:
            if _reset in changes or not self._answers(_apply(changes, self._state)):
                self._taken = self._owed = True
                self._zap()
                await self._each("revoke")
            try:
                result = await do()
            except BaseException as error:
                if refusable and isinstance(error, ServerError | LocalProtocolError):
                    await self._restore()
                else:
                    self._state = _apply(changes, self._state)
                raise
            self._state = _apply(changes, self._state)
            await self._restore()
            return result

    async def _restore(self) -> None:
        if not (self._owed and self._alive and self._answers(self._state)):
            return
        self._taken = False
        await self._each("restore")
        self._owed = False

    async def _each(self, what: Literal["revoke", "restore"]) -> None:
        """Have all followers do it at the same time, whatever becomes of others."""
        failed: list[Exception] = []

        async def do(follower: Follower) -> None:
            try:
                await getattr(follower, what)()
            except Exception as error:
                failed.append(error)

        async with trio.open_nursery() as nursery:
            for follower in self._followers:
                nursery.start_soon(do, follower)
        if len(failed) == 1:
            raise failed[0]
        if failed:
            raise ExceptionGroup(f"{len(failed)} users of the BARs could not {what}", failed)

    def _zap(self) -> None:
        for follower in tuple(self._followers):
            follower.zap()

    def end(self) -> None:
        """The session is over, and with it every right to the device's memory."""
        self._alive = False
        self._zap()

    # where the capabilities are

    def learn(self, config: ConfigSpace) -> None:
        """From a snapshot that somebody took; a list that makes no sense switches nothing off."""
        try:
            self._capabilities = config.capabilities
        except DeviceError:
            self._capabilities = ()

    async def _known_capabilities(self, offset: int, data: bytes) -> tuple[CapabilityEntry, ...]:
        """Those that a write may reach, read once if there are any; a device that does not let them be read
        has none.
        """
        if self._capabilities is None and offset + len(data) > HEADER_SIZE:
            with suppress(BadReplyError, DeviceError, ServerError):
                await read_config(self._session)  # which calls `learn`
        return self._capabilities or ()


def _changes(offset: int, data: bytes, capabilities: Iterable[CapabilityEntry]) -> list[Change]:
    """What a write to configuration space does to the decoding of memory, if anything."""

    def written(at: int) -> int | None:
        return data[at - offset] if offset <= at < offset + len(data) else None

    changes: list[Change] = []
    if (command := written(COMMAND)) is not None:
        changes.append(partial(replace, memory=bool(command & Command.MEMORY)))
    for capability in capabilities:
        at, was = capability.offset, capability.data.ljust(8, b"\0")
        if capability.id == CapabilityId.PM and (control := written(at + 4)) is not None:
            powered = control & POWER_STATE != D3_HOT
            changes.append(partial(_power, powered, keeps=bool(was[4] & NO_SOFT_RESET)))
        elif capability.id == CapabilityId.PCIE and was[7] & HAS_FLR:
            changes += [_reset] if (written(at + 9) or 0) & FLR else []
        elif capability.id == CapabilityId.AF and was[3] & AF_HAS_FLR:
            changes += [_reset] if (written(at + 4) or 0) & AF_FLR else []
    return changes


def _apply(changes: Iterable[Change], state: _State) -> _State:
    for change in changes:
        state = change(state)
    return state


def _power(powered: bool, state: _State, *, keeps: bool) -> _State:
    """Another power state; a device that keeps nothing in D3hot comes back with an empty COMMAND."""
    return _State(state.memory and (keeps or state.powered or not powered), powered)


def _reset(state: _State) -> _State:
    """A reset leaves D0 and an empty COMMAND."""
    return _State(memory=False)
