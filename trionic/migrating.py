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
from client.virtio import Wiring, open_net
from protocol.vfio import RegionFlags, RegionIndex
from trionic._groups import ungrouped
from trionic._traffic import Frames, Traffic
from trionic.errors import ONE_CLIENT, TrionicError

__all__ = ["Journey", "move", "text", "travel"]

# A server that does not answer in this time is stuck, or busy with another client that came before.
PATIENCE_S: Final = 10.0

# Bytes kept in the card's own memory.
_MEMORY: Final = 1 << 20
_PAGE: Final = 4096


@dataclass(slots=True)
class Journey(Frames):
    """What the moves took, and what became of the frames meanwhile."""

    moves: list[MigrationReport] = field(default_factory=list)
    memory: int = 0
    """Bytes of the card's own memory whose content was compared after each move."""

    @property
    def downtime_ms(self) -> float:
        """How long the card stood still in a move, in the middle of all."""
        return 1e3 * statistics.median(move.downtime_seconds for move in self.moves)

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
    with ungrouped(client.ClientError):
        return await _travel(source, target, rounds, precopy, wiring, progress)


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
        traffic = Traffic(nic, journey)
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
