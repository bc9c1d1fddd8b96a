"""Moving a device from one server to another (spec, "VFIO_DEVICE_FEATURE_MIGRATION" and what follows it).

    report = await migrate(source, target)

The two sessions must reach the same DMA memory at the same addresses; `NetDriver.share_with` sees to that
for a network driver, and `NetDriver.move_to` takes it along.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Final

import trio

from client.errors import BadReplyError, ClientError
from client.session import Session
from protocol import Command
from protocol.limits import PRECOPY_ENOUGH, PRECOPY_LIMIT, PRECOPY_PASSES, UNDO_TIMEOUT
from protocol.messages import FeatureMigration, FeatureMigState, MigData
from protocol.vfio import DeviceState, Feature, MigrationFlags

STARTING: Final = "starting the target"
"""The phase in which a target that fails may run all the same."""


class MigrationError(ClientError):
    """The device was not moved. `source_running` says whether it runs on as if nothing had been tried."""

    def __init__(self, phase: str, reason: str) -> None:
        super().__init__(f"the device was not moved ({phase}): {reason}")
        self.phase = phase
        self.source_running = False


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """What a migration took. The device stood still for `downtime_seconds`, and `bytes_stopcopy` moved
    then.
    """

    bytes_precopy: int
    bytes_stopcopy: int
    passes: int
    downtime_seconds: float
    total_seconds: float


class MigrationControl:
    """The migration commands of the device behind a session; they raise as `Session.request` does."""

    def __init__(self, session: Session) -> None:
        self.session = session

    async def flags(self) -> MigrationFlags:
        """Which ways of migration the device has; raises ServerError if it has none."""
        data = await self.session.feature_get(Feature.MIGRATION, room=FeatureMigration.size)
        return FeatureMigration.decode(data).flags

    async def state(self) -> DeviceState:
        """Where in the state machine of migration the device is."""
        data = await self.session.feature_get(Feature.MIG_DEVICE_STATE, room=FeatureMigState.size)
        return _state(data)

    async def set_state(self, state: DeviceState) -> None:
        """Take the device to a state, over as many others as the specification says; it is there when this
        returns.
        """
        data = await self.session.feature_set(Feature.MIG_DEVICE_STATE, FeatureMigState(state).encode())
        if (reached := _state(data)) is not state:
            raise BadReplyError(Command.DEVICE_FEATURE, f"the device is {reached.name}, not {state.name}")

    @property
    def chunk_size(self) -> int:
        """Bytes of the longest chunk that this session moves at once, either way."""
        return min(self.session.max_read, self.session.max_write)

    async def read_chunk(self, size: int) -> bytes:
        """The next bytes of the device's state, `size` at most (see `chunk_size`). Fewer mean that this is
        all, or in PRE_COPY all for now.
        """
        reply = await self.session.request(Command.MIG_DATA_READ, MigData(MigData.size + size, size))
        return reply.data

    async def write_chunk(self, data: bytes) -> None:
        """Give a resuming device the next bytes of its state (see `chunk_size`)."""
        body = MigData(MigData.size + len(data), len(data))
        await self.session.request(Command.MIG_DATA_WRITE, body, data)


def _state(data: bytes) -> DeviceState:
    try:
        return DeviceState(FeatureMigState.decode(data).device_state)
    except ValueError:
        raise BadReplyError(Command.DEVICE_FEATURE, f"{data.hex()} is no device state") from None


async def migrate(source: Session, target: Session, *, precopy: bool = True) -> MigrationReport:
    """Move the device behind `source` to `target`, whose own state is lost; the source stays in STOP.

    With `precopy`, and if the source can, most of its state moves while it runs. Raises MigrationError if
    either side refuses, lies or leaves; the source is then put back to RUNNING and the target reset, as they
    are when the task is cancelled. A target that cannot be told to stop is disconnected before the source
    runs again: never do both run. There is no timeout of its own: use trio.fail_after.
    """
    move = _Move(MigrationControl(source), MigrationControl(target))
    async with move.undone_on_failure():
        return await move.run(precopy)


class _Move:
    def __init__(self, source: MigrationControl, target: MigrationControl) -> None:
        self.source, self.target = source, target
        self.phase = "asking both sides"
        self.begun = False

    async def run(self, precopy: bool) -> MigrationReport:
        start = perf_counter()
        flags = await self.source.flags()
        for side in (flags, await self.target.flags()):
            if MigrationFlags.STOP_COPY not in side:
                raise ClientError("a device without STOP_COPY cannot be moved")
        self.begun = True
        self.phase = "preparing the target"
        await self.target.set_state(DeviceState.RESUMING)
        passes = ahead = 0
        if precopy and MigrationFlags.PRE_COPY in flags:
            self.phase = "copying the running device"
            await self.source.set_state(DeviceState.PRE_COPY)
            passes, ahead = await self._copy_ahead()
        self.phase = "copying the stopped device"
        stopped = perf_counter()
        await self.source.set_state(DeviceState.STOP_COPY)
        rest = await self._copy_pass()
        self.phase = "completing the target"
        await self.target.set_state(DeviceState.STOP)
        await self.source.set_state(DeviceState.STOP)
        self.phase = STARTING
        with trio.fail_after(UNDO_TIMEOUT, shield=True):
            await self.target.set_state(DeviceState.RUNNING)
        end = perf_counter()
        return MigrationReport(ahead, rest, passes, end - stopped, end - start)

    async def _copy_ahead(self) -> tuple[int, int]:
        """(passes, bytes) until the running device has little new to say."""
        passes = total = 0
        while passes < PRECOPY_PASSES and total < PRECOPY_LIMIT:
            moved = await self._copy_pass(PRECOPY_LIMIT - total)
            passes, total = passes + 1, total + moved
            if moved < PRECOPY_ENOUGH:
                break
        return passes, total

    async def _copy_pass(self, limit: int | None = None) -> int:
        """Move chunks until there is no more for now, or no fewer than `limit` bytes; how many bytes."""
        size = min(self.source.chunk_size, self.target.chunk_size)
        total = 0
        while limit is None or total < limit:
            chunk = await self.source.read_chunk(size)
            if chunk:
                await self.target.write_chunk(chunk)
            total += len(chunk)
            if len(chunk) < size:
                break
        return total

    @asynccontextmanager
    async def undone_on_failure(self) -> AsyncIterator[None]:
        try:
            yield
        except (ClientError, trio.TooSlowError) as error:
            reason = str(error) or f"no answer within {UNDO_TIMEOUT:g} seconds"
            failure = MigrationError(self.phase, reason)
            failure.source_running = await self._undo()
            if not failure.source_running:
                failure.add_note("the source could not be put back to RUNNING")
            raise failure from error
        except BaseException:
            await self._undo()
            raise

    async def _undo(self) -> bool:
        """Whether the source runs. It does again before the target is reset, unless both might run then."""
        if not self.begun:
            return True
        if self.phase == STARTING:
            if not await self._reset_target():
                self.target.session.hang_up("it may run a device that was not moved to it")
            return await self._resume_source()
        running = await self._resume_source()
        await self._reset_target()
        return running

    async def _resume_source(self) -> bool:
        with trio.move_on_after(UNDO_TIMEOUT, shield=True), suppress(ClientError):
            if await self.source.state() is not DeviceState.RUNNING:
                await self.source.set_state(DeviceState.RUNNING)
            return True
        return False

    async def _reset_target(self) -> bool:
        with trio.move_on_after(UNDO_TIMEOUT, shield=True), suppress(ClientError):
            await self.target.session.reset()
            return True
        return False
