"""Moves a card back and forth between two servers while its driver sends and receives, and counts.

The driver is this process: its rings and buffers are mapped in both servers, so a card that was moved goes
on where it stopped. Every frame has a number and comes back by the card's own loopback; none may be lost,
doubled or overtaken, however often the card moves.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

import client
from client.migration import MigrationReport
from client.virtio import NetDriver, Wiring, open_net
from protocol.vfio import RegionFlags, RegionIndex
from trionic._groups import first_of
from trionic.errors import ONE_CLIENT, TrionicError

__all__ = ["Journey", "move", "text", "travel"]

# A server that does not answer in this time is stuck, or busy with another client that came before.
PATIENCE_S: Final = 10.0

# What comes back after the last move has as long to do so; only a lost frame is waited for so long.
GRACE_S: Final = 2.0

# Frames under way at a time: fewer than a receive queue holds, so that the card never has to drop one.
UNDER_WAY: Final = 64

# Bytes kept in the card's own memory.
_MEMORY: Final = 1 << 20
_PAGE: Final = 4096

_FRAME_SIZE: Final = 256
_NUMBER_AT: Final = 14
_NUMBER_SIZE: Final = 8
_BROADCAST: Final = b"\xff" * 6
_SOMEBODY: Final = b"\x02\0\0\0\0\1"  # locally administered
_ETHERTYPE: Final = b"\x88\xb5"  # IEEE 802 local experimental Ethertype 1


@dataclass(slots=True)
class Journey:
    """What the moves took, and what became of the frames meanwhile."""

    moves: list[MigrationReport] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    doubled: int = 0
    """Frames that came back once more than they were sent."""
    overtaken: int = 0
    """Frames that came back before one that was sent earlier."""
    memory: int = 0
    """Bytes of the card's own memory whose content was compared after each move."""

    @property
    def lost(self) -> int:
        """Frames that did not come back."""
        return self.sent - (self.received - self.doubled)

    @property
    def downtime_ms(self) -> float:
        """How long the card stood still in a move, in the middle of all."""
        return 1e3 * statistics.median(move.downtime_seconds for move in self.moves)

    @property
    def sound(self) -> bool:
        """Whether every frame came back once, in order."""
        return not (self.lost or self.doubled or self.overtaken)

    def as_json(self) -> dict[str, Any]:
        """Everything, for programs; times in seconds, sizes in bytes."""
        return {
            "moves": [asdict(move) for move in self.moves],
            "sent": self.sent,
            "received": self.received,
            "lost": self.lost,
            "doubled": self.doubled,
            "overtaken": self.overtaken,
            "memory": self.memory,
        }


class _Traffic:
    """Numbered frames from the driver to itself, as many as the card takes."""

    def __init__(self, nic: NetDriver, journey: Journey) -> None:
        self._nic = nic
        self._journey = journey
        address = nic.mac or _BROADCAST  # for a card that has no address of its own
        self._head = address + (nic.mac or _SOMEBODY) + _ETHERTYPE
        self._expected = 0
        self._waiting: set[int] = set()
        self._room = trio.Event()
        self._quiet = trio.Event()
        self._begun = trio.Event()
        self._ending = False

    async def send(self) -> None:
        while not self._ending:
            if len(self._waiting) >= UNDER_WAY:
                self._room = trio.Event()
                await self._room.wait()
                continue
            number = self._journey.sent
            self._journey.sent += 1
            self._waiting.add(number)
            frame = self._head + number.to_bytes(_NUMBER_SIZE, "big")
            await self._nic.send(frame.ljust(_FRAME_SIZE, b"\0"))

    async def receive(self) -> None:
        while True:
            for frame in self._nic.receive_burst():
                self._take(int.from_bytes(frame[_NUMBER_AT : _NUMBER_AT + _NUMBER_SIZE], "big"))
            if len(self._waiting) < UNDER_WAY:
                self._room.set()
            if self._ending and not self._waiting:
                self._quiet.set()
                return
            await self._nic.wait_receivable()

    def _take(self, number: int) -> None:
        journey = self._journey
        journey.received += 1
        self._begun.set()
        if number not in self._waiting:
            journey.doubled += 1
            return
        self._waiting.remove(number)
        if number != self._expected:
            journey.overtaken += 1
        self._expected = number + 1

    async def wait_begun(self) -> None:
        """Until the first frame came back."""
        with trio.move_on_after(GRACE_S):
            await self._begun.wait()
            return
        raise client.ClientError(
            "no frame comes back: only a card whose port is a loopback can be counted under traffic"
        )

    async def end(self) -> None:
        """Send no more, and wait for what is under way."""
        self._ending = True
        self._room.set()
        with trio.move_on_after(GRACE_S):
            await self._quiet.wait()


class _CardMemory:
    """What the driver keeps in the card's own memory: one page of it is another one before each move."""

    def __init__(self, session: client.Session) -> None:
        regions = session.regions
        region = regions[RegionIndex.BAR2] if len(regions) > RegionIndex.BAR2 else None
        # What can be mapped is memory; anything else may be registers, which are not ours to write.
        there = region is not None and RegionFlags.MMAP in region.flags
        self.size = min(_MEMORY, region.size) if region is not None and there else 0
        self._content = bytearray(os.urandom(self.size))

    async def fill(self, session: client.Session) -> None:
        """Put the content there."""
        if self.size:
            await session.region_write(RegionIndex.BAR2, 0, self._content)

    async def change(self, session: client.Session, number: int) -> None:
        """Replace a page."""
        if self.size:
            at = number * _PAGE % self.size
            self._content[at : at + _PAGE] = page = os.urandom(min(_PAGE, self.size - at))
            await session.region_write(RegionIndex.BAR2, at, page)

    async def compare(self, session: client.Session) -> None:
        """ClientError unless the content is what was put there."""
        if self.size and await session.region_read(RegionIndex.BAR2, 0, self.size) != self._content:
            raise client.ClientError("the card's memory is not what it was before the move")


async def travel(
    source: Path,
    target: Path,
    rounds: int,
    *,
    precopy: bool = True,
    wiring: Wiring = Wiring.MSIX,
    progress: Callable[[int], None] = lambda done: None,
) -> Journey:
    """Move the card at ``source`` to ``target`` and back, ``rounds`` times, under traffic.

    ``progress`` is told how many moves are done. ClientError if either cannot be reached, if the card sends
    nothing back, or if a move fails or takes longer than `PATIENCE_S`: the card is where it was before that
    move then. Ctrl-C is raised as KeyboardInterrupt, never in a group.
    """
    try:
        return await _travel(source, target, rounds, precopy, wiring, progress)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt):
            raise KeyboardInterrupt from group
        first = first_of(group, (client.ClientError,))
        if first is None:
            raise
        raise first from None


async def _travel(
    source: Path,
    target: Path,
    rounds: int,
    precopy: bool,
    wiring: Wiring,
    progress: Callable[[int], None],
) -> Journey:
    journey = Journey()
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(_connect(path)) for path in (source, target)]
        nic = await stack.enter_async_context(open_net(first, wiring=wiring))
        await nic.share_with(second)
        traffic = _Traffic(nic, journey)
        memory = _CardMemory(first)
        journey.memory = memory.size
        await memory.fill(first)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traffic.send)
            nursery.start_soon(traffic.receive)
            await traffic.wait_begun()
            for done in range(2 * rounds):
                to = first if done % 2 else second
                with _patience(f"move {done + 1} is"):
                    await memory.change(nic.session, done)
                    journey.moves.append(await nic.migrate_to(to, precopy=precopy))
                    await memory.compare(nic.session)
                progress(done + 1)
            await traffic.end()
            nursery.cancel_scope.cancel()
    return journey


def move(source: Path, target: Path, rounds: int, **options: Any) -> Journey:
    """`travel` for those without an event loop; TrionicError, in one line, if it fails."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise TrionicError(f"{source} and {target} are the same server; a card moves from one to another")
    try:
        return trio.run(partial(travel, source, target, rounds, **options))
    except client.ClientError as error:
        raise TrionicError(str(error)) from error


@contextmanager
def _patience(what: str) -> Iterator[None]:
    try:
        with trio.fail_after(PATIENCE_S):
            yield
    except trio.TooSlowError:
        raise client.ClientError(f"{what} not done within {PATIENCE_S:g} s; is a server stopped?") from None


@asynccontextmanager
async def _connect(path: Path) -> AsyncIterator[client.Session]:
    """A session with a server that answers in time."""
    patience = trio.CancelScope(deadline=trio.current_time() + PATIENCE_S)
    with patience:
        async with client.connect(path) as session:
            patience.deadline = math.inf
            yield session
    if patience.cancelled_caught:
        raise client.ClientError(f"{path}: no answer within {PATIENCE_S:g} s; {ONE_CLIENT}")


def text(journey: Journey) -> str:
    """What happened, for people."""
    moves = journey.moves
    longest = 1e3 * max(move.downtime_seconds for move in moves)
    ahead = statistics.mean(move.bytes_precopy for move in moves)
    rest = statistics.mean(move.bytes_stopcopy for move in moves)
    lines = (
        ("moves", f"{len(moves)}, each back where the one before came from"),
        ("frames", f"{journey.sent} sent, {journey.received} back"),
        ("lost", str(journey.lost)),
        ("doubled", str(journey.doubled)),
        ("overtaken", str(journey.overtaken)),
        ("memory", f"{journey.memory >> 10} KiB on the card, the same after each move"),
        ("downtime", f"{journey.downtime_ms:.1f} ms, {longest:.1f} ms at most"),
        ("state", f"{ahead / 1024:,.0f} KiB while running, {rest / 1024:,.0f} KiB while stopped"),
    )
    return "\n".join(f"{name:<10} {value}" for name, value in lines)
