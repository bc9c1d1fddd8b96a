"""What can happen to two cards and a container, step by step, and what must hold then: told by the cards'
windows and bytes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import Final

import trio
import trio.testing
from hypothesis import strategies as st

import client
from client import ClientError
from client.container import BarRange, Container, ContainerError, Entry, Mode, PageMemory
from client.dmabuf import BarExport, export_bar
from client.mapping import BarMapping, MappingError
from client.session import READ_WRITE
from device.revocation import Revocation
from protocol.limits import UNMAP_TIMEOUT
from protocol.vfio import DmaMapFlags
from tests.client.irqchip.card import Link
from tests.client.peering.engine import MEMORY, MEMORY_SIZE, PAGE, Engine
from tests.client.peering.switching import Switch, Way

SLOT: Final = 2 * PAGE
SLOTS: Final = 4
ADDRESSES: Final = {"memory": 0x10_0000, "range": 0x20_0000, "export": 0x30_0000}
"""Where each kind of backing is mapped, so that a window tells what is behind it."""


class Do(Enum):
    """What can happen; the number of a step says to which slot, or how."""

    ATTACH = auto()
    DETACH = auto()
    MAP_MEMORY = auto()
    MAP_RANGE = auto()
    MAP_RANGE_AND_GIVE_UP = auto()
    MAP_EXPORT = auto()
    UNMAP = auto()
    PROTECT = auto()
    DMA = auto()
    WRITE = auto()
    OFF = auto()
    ON = auto()
    OFF_AND_GIVE_UP = auto()
    CUT = auto()
    PIN = auto()
    UNPIN = auto()
    LOSE_A = auto()
    LOSE_B = auto()
    RECONNECT_A = auto()
    RECONNECT_B = auto()
    PASS_TIME = auto()


OFTEN: Final = (Do.MAP_RANGE, Do.MAP_EXPORT, Do.DMA, Do.OFF, Do.OFF, Do.ON, Do.ON, Do.ATTACH, Do.WRITE) * 3
AFTER: Final = (None, None, None, 0, 1, 1, 2, 3, 4, 6, 8, 11, 15, 20, 30)


@dataclass(frozen=True, slots=True)
class Step:
    """Something happens. The next step comes `after` so many turns of the scheduler, or once all is quiet."""

    do: Do
    number: int
    after: int | None


STEPS: Final = st.lists(
    st.builds(Step, st.sampled_from([*OFTEN, *Do]), st.integers(0, SLOTS - 1), st.sampled_from(AFTER)),
    min_size=8,
    max_size=40,
)


class Side:
    """A card and the client's session with it, which may be lost."""

    def __init__(self, engine: Engine, nursery: trio.Nursery) -> None:
        self.engine = engine
        self.link: Link
        self._nursery = nursery
        self.alive = False
        self.stack = AsyncExitStack()
        """What goes when the session does."""
        self.switch: Switch

    @property
    def session(self) -> client.Session:
        return self.link.session

    async def connect(self) -> None:
        link = Link(self.engine)  # type: ignore[arg-type]
        await self._nursery.start(link.run)
        self.link, self.alive = link, True
        self.switch = await Switch.of(link.session)

    def lose(self) -> None:
        self.link.lose()
        self.alive = False

    async def leave(self) -> None:
        self.link.lose()
        self.alive = False
        await self.stack.aclose()
        await self.link.end()


@dataclass(slots=True)
class Item:
    """Something that is mapped in the container."""

    kind: str
    number: int
    entry: Entry
    session: client.Session
    changes: tuple[int, int]
    """How many changes of the lender's memory had begun before it was mapped, and since."""
    memory: PageMemory | None = None

    @property
    def iova(self) -> int:
        return self.entry.iova


class Story:
    """One example."""

    def __init__(
        self,
        clock: trio.testing.MockClock,
        nursery: trio.Nursery,
        container: Container,
        a: Side,
        b: Side,
        stack: AsyncExitStack,
    ) -> None:
        self._clock = clock
        self._nursery = nursery
        self._container = container
        self._stack = stack
        self.a, self.b = a, b
        self._items: dict[int, Item] = {}
        self._labels = count(1)
        self._under_way = 0
        self._changes = 0
        self._cut = False
        """The lender took its memory away on its own account: what a card writes there is lost."""
        self._lost = False
        """Its session was lost, and not everybody may have heard of it; it is as new, and has new memory."""
        self._mappings: dict[client.Session, BarMapping] = {}
        self._exports: dict[tuple[client.Session, int], BarExport] = {}
        self._locks = {"a": trio.Lock(), "b": trio.Lock()}

    # --- what happens

    def _begin(self, step: Step) -> None:
        number = step.number
        match step.do:
            case Do.ATTACH:
                self._start(self._container.attach, self.a.session)
            case Do.DETACH:
                self._start(self._container.detach, self.a.session)
            case Do.MAP_MEMORY:
                self._start(self._map, "memory", number, None)
            case Do.MAP_RANGE:
                self._start(self._map, "range", number, None)
            case Do.MAP_RANGE_AND_GIVE_UP:
                self._start(self._map, "range", number, 5 * number)
            case Do.MAP_EXPORT:
                self._start(self._map, "export", number, None)
            case Do.UNMAP:
                self._start(self._unmap, number)
            case Do.PROTECT:
                self._start(self._protect, number)
            case Do.DMA:
                self._dma()
            case Do.WRITE:
                self._write(number)
            case Do.OFF:
                self._start(self._off, [*Way][number])
            case Do.OFF_AND_GIVE_UP:
                self._start(self._off_and_give_up, [*Way][number])
            case Do.ON:
                self._start(self._on, Way.D3 if number == 0 else Way.COMMAND)
            case Do.CUT:
                self._cut_away()
            case Do.PIN:
                for item in self._items.values():
                    self.a.engine.pin(item.iova, PAGE)
            case Do.UNPIN:
                self.a.engine.unpin()
            case Do.LOSE_A:
                self.a.lose()
            case Do.LOSE_B:
                self._changes += 1
                self._lost = True
                self.b.lose()
            case Do.RECONNECT_A:
                self._start(self._reconnect, self.a, "a")
            case Do.RECONNECT_B:
                self._changes += 1
                self._lost = True
                self._start(self._reconnect, self.b, "b")
            case Do.PASS_TIME:
                pass

    def _start(self, do: Callable[..., Awaitable[object]], *what: object) -> None:
        async def follow() -> None:
            try:
                await do(*what)
            except ClientError:
                pass  # refused, or the session is over
            except ExceptionGroup as group:
                if group.split(ClientError)[1] is not None:
                    raise
            finally:
                self._under_way -= 1

        self._under_way += 1
        self._nursery.start_soon(follow)

    async def _reconnect(self, side: Side, name: str) -> None:
        async with self._locks[name]:
            await side.leave()
            await side.connect()
            if side is self.b:
                self._cut = False

    async def _map(self, kind: str, number: int, give_up_after: int | None) -> None:
        session, changes = self.b.session, self._changes
        backing = await self._backing(kind, number)
        iova = ADDRESSES[kind] + number * SLOT
        with trio.CancelScope() as scope:
            if give_up_after is not None:
                self._nursery.start_soon(self._cancel, scope, give_up_after)
            entry = await self._container.map(iova, backing)
            memory = backing if isinstance(backing, PageMemory) else None
            self._items[iova] = Item(kind, number, entry, session, (changes, self._changes), memory)

    async def _backing(self, kind: str, number: int) -> PageMemory | BarRange | BarExport:
        if kind == "memory":
            memory = PageMemory.allocate(SLOT)
            self._stack.callback(memory.close)
            return memory
        session = self.b.session
        if kind == "range":
            return BarRange(self._mapping(session), number * SLOT, SLOT)
        if (session, number) not in self._exports:
            ranges = (((SLOTS + number) * SLOT, SLOT),)
            export = self._exports[session, number] = await export_bar(session, MEMORY, ranges)
            self.b.stack.push_async_callback(export.aclose)
            self._nursery.start_soon(self._revoke_at_end, session, export)
        return self._exports[session, number]

    async def _revoke_at_end(self, session: client.Session, export: BarExport) -> None:
        await session.wait_end()
        await export.revoke()

    def _mapping(self, session: client.Session) -> BarMapping:
        """Open to the end: it may be mapped as long."""
        if session not in self._mappings:
            mapping = BarMapping(session.regions[MEMORY], session.decoding)
            self._mappings[session] = self._stack.enter_context(mapping)
        return self._mappings[session]

    async def _cancel(self, scope: trio.CancelScope, after: int) -> None:
        await turns(after)
        scope.cancel()

    async def _unmap(self, number: int) -> None:
        for item in list(self._items.values())[number:]:
            await self._container.unmap(item.iova, SLOT)
            if self._items.get(item.iova) is item:
                del self._items[item.iova]

    async def _protect(self, number: int) -> None:
        for item in list(self._items.values())[number:]:
            await self._container.protect(item.iova, SLOT, DmaMapFlags.READ)
            await self._container.protect(item.iova, SLOT, READ_WRITE)

    async def _off(self, way: Way) -> None:
        """A reset leaves zeros, whoever wrote until then."""
        self._changes += 1
        session = self.b.session
        await self.b.switch.off(way)
        if session is self.b.session and self.b.alive:
            self._cut = False
            assert way.keeps or self._lent_bytes() == bytes(MEMORY_SIZE)

    async def _off_and_give_up(self, way: Way) -> None:
        with trio.CancelScope() as scope:
            self._nursery.start_soon(self._cancel, scope, 3)
            await self._off(way)
        for item in self._items.values():
            item.changes = (-1, 0)  # nobody can say whether it was revoked

    async def _on(self, way: Way) -> None:
        await self.b.switch.on(way)

    def _cut_away(self) -> None:
        """The lender's own doing, without a word."""
        if self.b.engine.memory.revocation is Revocation.ENFORCED and self.b.alive:
            self._cut = True
            self._changes += 1
            self.b.engine.memory.decode(False)

    # --- what must hold at any moment

    def _dma(self) -> None:
        """The card writes wherever it might have a window."""
        for kind, first in ADDRESSES.items():
            for number in range(SLOTS):
                iova = first + number * SLOT + PAGE - 8
                label = next(self._labels).to_bytes(8, "little")
                before = self._lent_bytes()
                there = self.a.engine.store(iova, label)
                if kind == "memory":
                    self._check_own(there, iova, label)
                elif there and not (self._lost and self._lent_bytes() == before):
                    self._check_lent(kind, number, label)
                elif not there:
                    assert self._lent_bytes() == before, "it was refused"

    def _check_own(self, there: bool, iova: int, label: bytes) -> None:
        item = self._items.get(iova & ~(SLOT - 1))
        if there and item is not None and item.memory is not None:
            assert item.memory.view[PAGE - 8 : PAGE] == label

    def _check_lent(self, kind: str, number: int, label: bytes) -> None:
        assert self.b.engine.function.memory_enabled, "a card reaches what is not decoded"
        if not self._cut and self.b.alive:
            offset = (number + SLOTS * (kind == "export")) * SLOT + PAGE - 8
            assert self.b.engine.memory.load(offset, 8) == label, "what was written is elsewhere"

    def _lent_bytes(self) -> bytes:
        return self.b.engine.memory.load(0, MEMORY_SIZE)

    def _write(self, number: int) -> None:
        """The client writes, by a mapping; what does not reach the card changes nothing there."""
        session = self.b.session
        offset = MEMORY_SIZE - 8 * (1 + number)
        label = next(self._labels)
        before = self._lent_bytes()
        enabled = self.b.engine.function.memory_enabled
        try:
            mapping = self._mapping(session)
            mapping.write(offset, 8, label)
        except MappingError:
            assert self._lent_bytes() == before
            return
        if not enabled:
            assert self._lent_bytes() == before, "it is not decoded"
        elif session.decoding.enabled and not self._cut and self.b.alive:
            assert self.b.engine.memory.load(offset, 8) == label.to_bytes(8, "little")

    # --- what must hold when all is quiet

    async def tell(self, steps: list[Step]) -> None:
        """All that happens, and then the end."""
        for step in steps:
            if step.do is Do.PASS_TIME:
                await trio.testing.wait_all_tasks_blocked()
                self._clock.jump(UNMAP_TIMEOUT)
            self._begin(step)
            if step.after is not None:
                await turns(step.after)
            else:
                await self._settle()
        await self._settle()
        await self._put_right()
        self._dma()

    async def _settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert self._under_way == 0 or self.a.engine.pins, "nobody waits for ever"
        self._lost &= bool(self.a.engine.pins)  # which are of the memory that was left
        windows = {(iova, size) for iova, size, _, _ in self.a.engine.function.dma.windows()}
        if not (self.b.engine.function.memory_enabled or self._lost):
            assert not [iova for iova, _ in windows if iova >= ADDRESSES["range"]]
        if self._under_way or self._lost:
            return
        for item in self._items.values():
            wanted = self._wanted(item)
            if wanted is not None:
                assert ((item.iova, SLOT) in windows) == wanted, item
                assert item.entry.present == self._placed(item)
        stray = {iova for iova, _ in windows} - self._items.keys()
        assert not stray, "nobody mapped that"

    def _wanted(self, item: Item) -> bool | None:
        """Whether the card is to have a window to it; None if nobody can say."""
        attached = self.a.alive and self.a.session in self._container.sessions
        placed = self._placed(item)
        return None if placed is None else placed and attached

    def _placed(self, item: Item) -> bool | None:
        if item.kind == "memory":
            return True
        if not (item.session is self.b.session and self.b.alive and self.b.engine.function.memory_enabled):
            return False
        if not item.session.decoding.enabled:
            return None  # somebody gave up switching it off
        if self._cut or item.entry.error is not None:
            return item.entry.present
        if self._container.mode is Mode.IOMMUFD:
            before, at = item.changes
            return at == self._changes if before == at else item.entry.present
        return True

    async def _put_right(self) -> None:
        """Give everybody whatever is needed to go on: all is as it was at first."""
        self.a.engine.unpin()
        await trio.testing.wait_all_tasks_blocked()
        self._clock.jump(4 * UNMAP_TIMEOUT)
        await self._settle()
        for side, name in ((self.a, "a"), (self.b, "b")):
            self._changes += 1
            await self._reconnect(side, name)
        with suppress(ContainerError):
            await self._container.attach(self.a.session)
        await self.b.switch.on(Way.D3)
        await self.b.switch.on()
        await self._settle()
        assert self._lent_bytes() == bytes(MEMORY_SIZE)
        for item in list(self._items.values()):
            await self._container.unmap(item.iova, SLOT)
        self._items.clear()
        assert self.a.engine.function.dma.windows() == []
        kind = "export" if self._container.mode is Mode.IOMMUFD else "range"
        for number in range(SLOTS):
            await self._map(kind, number, None)
        await self._settle()
        assert len(self.a.engine.function.dma) == SLOTS


async def turns(number: int) -> None:
    """Let everybody else go on for so many turns of the scheduler."""
    for _ in range(number):
        await trio.lowlevel.checkpoint()
