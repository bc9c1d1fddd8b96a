"""A container through everything that can happen to it, in any order, against a model: what each server
believes is what the model says it was given.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from enum import Enum, auto
from errno import EACCES, EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, ENOSPC, EPERM
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

import client
from client.container import BarRange, Container, ContainerError, Mode, PageMemory, open_container
from client.container.limits import PAGE
from client.mapping import BarMapping
from protocol.vfio import DmaMapFlags
from tests.client.container.believer import Believed, Believer, believing, set_memory, with_bar
from tests.client.peer import DMA_MAP

THOROUGH = os.environ.get("CI", "").lower() == "true"
READ, BOTH = DmaMapFlags.READ, DmaMapFlags.READ | DmaMapFlags.WRITE
BASE = 0x10000
ENTRIES = 4
LOCKED = 6
"""Pages that may be locked."""


class Do(Enum):
    MAP_MEMORY = auto()
    MAP_BAR = auto()
    MAP_REFUSED = auto()
    UNMAP = auto()
    PROTECT = auto()
    PIN = auto()
    UNPIN = auto()
    ATTACH = auto()
    DETACH = auto()
    MEMORY_OFF = auto()
    MEMORY_ON = auto()
    RESET = auto()


UNDONE = (Do.MAP_MEMORY, Do.MAP_BAR, Do.MAP_REFUSED, Do.ATTACH)
"""What is undone when it is given up; the rest is done all the same, unless it has not begun."""


@dataclass(frozen=True)
class Step:
    """`number` pages from page `slot` on, or device `slot`; given up after so many turns of the scheduler."""

    do: Do
    slot: int
    number: int
    flags: DmaMapFlags
    give_up: int | None

    @property
    def iova(self) -> int:
        return BASE + self.slot * PAGE

    @property
    def size(self) -> int:
        return self.number * PAGE


STEPS = st.lists(
    st.builds(
        Step,
        st.sampled_from([*Do, Do.MAP_MEMORY, Do.MAP_BAR, Do.UNMAP, Do.ATTACH]),
        st.integers(0, 6),
        st.integers(1, 4),
        st.sampled_from([READ, BOTH]),
        st.sampled_from([None, None, None, 0, 1, 2, 3, 5, 8]),
    ),
    min_size=5,
    max_size=40,
)


@dataclass
class Item:
    size: int
    flags: DmaMapFlags
    bar: bool
    pins: dict[int, int] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818
    """The errno that the model refuses a step with."""


@dataclass
class Model:
    """What there should be. `on`: the BAR's device answers."""

    mode: Mode
    items: dict[int, Item] = field(default_factory=dict)
    attached: set[int] = field(default_factory=set)
    on: bool = True

    def mapped_pages(self) -> int:
        return sum(item.size // PAGE for item in self.items.values() if not item.bar)

    def locked_pages(self) -> int:
        if self.attached:
            return self.mapped_pages()
        return sum(len(item.pins) for item in self.items.values())

    def _overlapping(self, iova: int, size: int) -> dict[int, Item]:
        return {
            at: item for at, item in sorted(self.items.items()) if at < iova + size and iova < at + item.size
        }

    def _selected(self, iova: int, size: int) -> dict[int, Item]:
        found = self._overlapping(iova, size)
        sticks_out = any(at < iova or at + item.size > iova + size for at, item in found.items())
        if self.mode is Mode.TYPE1:
            return found if all(at >= iova for at in found) else {}
        if self.mode is Mode.IOMMUFD and (sticks_out or not found):
            raise Refusal(ENOENT)
        if sticks_out:
            raise Refusal(EINVAL)
        return found

    def _map(self, step: Step) -> None:
        bar = step.do is Do.MAP_BAR
        if self._overlapping(step.iova, step.size):
            raise Refusal(EEXIST)
        if self.mode is not Mode.IOMMUFD and len(self.items) == ENTRIES:
            raise Refusal(ENOSPC)
        if self.attached and not bar and self.mapped_pages() + step.number > LOCKED:
            raise Refusal(ENOMEM)
        if bar and (self.mode is Mode.IOMMUFD or not self.on):
            raise Refusal(EFAULT)
        if step.do is Do.MAP_REFUSED and self.attached:
            raise Refusal(EIO)
        self.items[step.iova] = Item(step.size, step.flags, bar)

    def _pin(self, step: Step) -> None:
        if self.mode is Mode.TYPE1:
            raise Refusal(EACCES)
        for at in range(step.iova, step.iova + step.size, PAGE):
            if not (found := self._overlapping(at, PAGE)):
                raise Refusal(ENOENT if self.mode is Mode.IOMMUFD else EINVAL)
            ((start, item),) = found.items()
            if item.flags & step.flags != step.flags:
                raise Refusal(EPERM)
            if item.bar:
                raise Refusal(EINVAL)
            page = (at - start) // PAGE
            if page not in item.pins and not self.attached and self.locked_pages() == LOCKED:
                raise Refusal(ENOMEM)
            item.pins[page] = item.pins.get(page, 0) + 1

    def _unpin(self, step: Step) -> None:
        if self.mode is Mode.TYPE1:
            raise Refusal(EACCES)
        for at in range(step.iova, step.iova + step.size, PAGE):
            for start, item in self._overlapping(at, PAGE).items():
                page = (at - start) // PAGE
                if page in item.pins:
                    item.pins[page] -= 1
                    if not item.pins[page]:
                        del item.pins[page]

    def _unmap(self, step: Step) -> None:
        selected = self._selected(step.iova, step.size)
        if any(item.pins for item in selected.values()):
            raise Refusal(EBUSY)
        for at in selected:
            del self.items[at]

    def _protect(self, step: Step) -> None:
        selected = self._selected(step.iova, step.size)
        if any(item.pins for item in selected.values()):
            raise Refusal(EBUSY)
        if not selected:
            raise Refusal(EINVAL)
        for item in selected.values():
            item.flags = step.flags

    def _attach(self, step: Step) -> None:
        if step.slot % 3 in self.attached:
            raise Refusal(EBUSY)
        if not self.attached and self.mapped_pages() > LOCKED:
            raise Refusal(ENOMEM)
        self.attached.add(step.slot % 3)

    def _detach(self, step: Step) -> None:
        if step.slot % 3 not in self.attached:
            raise Refusal(ENODEV)
        self.attached.remove(step.slot % 3)

    def after(self, step: Step) -> tuple[Model, int]:
        """What it becomes, and the errno of the refusal if it stays as it is."""
        model = deepcopy(self)
        try:
            match step.do:
                case Do.MAP_MEMORY | Do.MAP_BAR | Do.MAP_REFUSED:
                    model._map(step)
                case Do.UNMAP:
                    model._unmap(step)
                case Do.PROTECT:
                    model._protect(step)
                case Do.PIN:
                    model._pin(step)
                case Do.UNPIN:
                    model._unpin(step)
                case Do.ATTACH:
                    model._attach(step)
                case Do.DETACH:
                    model._detach(step)
                case Do.MEMORY_ON:
                    model.on = True
                case Do.MEMORY_OFF | Do.RESET:
                    model.on = False
        except Refusal as refusal:
            return self, refusal.args[0]
        return model, 0


class Story:
    """One example: the real container, three servers of which the last has a BAR, and the model."""

    def __init__(
        self,
        mode: Mode,
        container: Container,
        devices: list[tuple[client.Session, Believer]],
        mapping: BarMapping,
        memory: PageMemory,
    ) -> None:
        self.model = Model(mode)
        self.container = container
        self.devices = devices
        self.mapping = mapping
        self.memory = memory
        self.user = container.pin_user(lambda iova, size: None)

    def _call(self, step: Step) -> Callable[[], Awaitable[object]]:
        container, (owner, _) = self.container, self.devices[2]
        session = self.devices[step.slot % 3][0]
        match step.do:
            case Do.MAP_BAR:
                return partial(container.map, step.iova, BarRange(self.mapping, PAGE, step.size), step.flags)
            case Do.MAP_MEMORY | Do.MAP_REFUSED:
                return partial(container.map, step.iova, self.memory.part(0, step.size), step.flags)
            case Do.UNMAP:
                return partial(container.unmap, step.iova, step.size)
            case Do.PROTECT:
                return partial(container.protect, step.iova, step.size, step.flags)
            case Do.ATTACH:
                return partial(container.attach, session)
            case Do.DETACH:
                return partial(container.detach, session)
            case Do.RESET:
                return owner.reset
            case Do.MEMORY_ON | Do.MEMORY_OFF:
                return partial(set_memory, owner, step.do is Do.MEMORY_ON)
        return partial(self._pins, step)

    async def _pins(self, step: Step) -> None:
        await trio.lowlevel.checkpoint()
        if step.do is Do.PIN:
            self.container.pin(step.iova, step.number, step.flags, user=self.pinner)
        else:
            self.container.unpin(step.iova, step.number, user=self.pinner)

    async def run(self, steps: list[Step]) -> None:
        with self.user as self.pinner:
            for step in steps:
                await self._do(step)

    async def _do(self, step: Step) -> None:
        after, errno = self.model.after(step)
        attached = [server for session, server in self.devices if session in self.container.sessions]
        refusing = attached[-1:] if step.do is Do.MAP_REFUSED else []
        for server in refusing:
            server.refuse[DMA_MAP] = EIO
        may_give_up = step.do not in (Do.MEMORY_ON, Do.MEMORY_OFF, Do.RESET)
        got: int | None = None  # it was given up
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                if step.give_up is not None and may_give_up:
                    nursery.start_soon(self._give_up, step.give_up, scope)
                try:
                    await self._call(step)()
                    got = 0
                except ContainerError as error:
                    got = error.errno
                nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        for server in refusing:
            server.refuse.clear()
        if got is not None:
            assert got == errno, step
            self.model = after
        elif step.do not in UNDONE and self._same(after):
            self.model = after
        self._check()

    async def _give_up(self, turns: int, scope: trio.CancelScope) -> None:
        for _ in range(turns):
            await trio.lowlevel.checkpoint()
        scope.cancel()

    def _same(self, model: Model) -> bool:
        sessions = {
            number for number, (session, _) in enumerate(self.devices) if session in self.container.sessions
        }
        return (
            sessions == model.attached
            and {
                entry.iova: Item(entry.size, entry.flags, isinstance(entry.backing, BarRange), entry.pins)
                for entry in self.container.entries
            }
            == model.items
        )

    def _check(self) -> None:
        model = self.model
        assert self._same(model)
        assert self.container.locked_pages == model.locked_pages()
        assert self.mapping.decoding is not None
        assert self.mapping.decoding.enabled is model.on
        files = {False: self.memory.fd, True: self.mapping.fd}
        believed = {
            at: Believed(
                item.size,
                int(item.flags),
                (self.mapping.region.mmap_offset + PAGE) if item.bar else 0,
                os.fstat(files[item.bar]).st_ino,
            )
            for at, item in model.items.items()
            if model.on or not item.bar
        }
        for entry in self.container.entries:
            assert entry.present is (entry.iova in believed)
            assert entry.error is None
        for number, (session, server) in enumerate(self.devices):
            windows = believed if number in model.attached else {}
            assert server.windows == windows
            assert {window.iova: window.size for window in session.windows} == {
                at: one.size for at, one in windows.items()
            }
            for slot in range(12):
                at = BASE + slot * PAGE
                taken = any(start <= at < start + one.size for start, one in windows.items())
                assert session.iovas.in_use(at, PAGE) is taken


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """What the container says of servers that refuse is not kept: there are hundreds of them here."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@given(st.sampled_from(list(Mode)), STEPS)
@settings(max_examples=1500 if THOROUGH else 300)
async def test_every_server_believes_what_the_model_says(mode: Mode, steps: list[Step]) -> None:
    async with AsyncExitStack() as stack:
        devices = [await stack.enter_async_context(believing()) for _ in range(2)]
        owner, server, mapping = await stack.enter_async_context(with_bar())
        memory = stack.enter_context(PageMemory.allocate(4 * PAGE))
        opened = open_container(mode, entry_limit=ENTRIES, locked_limit=LOCKED * PAGE)
        container = await stack.enter_async_context(opened)
        devices.append((owner, server))
        with trio.fail_after(20):
            await Story(mode, container, devices, mapping, memory).run(steps)
