"""INTx through everything that can happen to it, in any order and at any moment: it never goes deaf, and
nothing is heard twice.

What is true is read from the card (its level, its mask, what it was told), from the irqchips and from the
kernel (what an eventfd counts): never from what the client believes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from client.irqchip import NOWHERE, IntxMode, IntxRoute, IrqchipError
from client.irqchip.userspace import open_ioapic, open_pic
from tests.client.irqchip.card import Card
from tests.client.irqchip.machine import Driver, Machine, Socketed
from tests.descriptors import open_fds

THOROUGH: Final = os.environ.get("CI", "").lower() == "true"
STORIES: Final = 10_000 if THOROUGH else 500
PARTS: Final = 10
PARTS_OF_TWO: Final = 2
MAPPINGS_BACK_S: Final = 1.2
"""Longer than BAR mappings stay off after the last interrupt on the slow path."""

ROUTES: Final = (
    IntxRoute(IntxMode.ENABLED, 10),
    IntxRoute(IntxMode.ENABLED, 11),
    IntxRoute(IntxMode.ENABLED, 20),  # an input that only one of the irqchips has
    IntxRoute(IntxMode.INVERTED, 11),
    NOWHERE,
)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """What the client has to say of irqchips that refuse is not kept: there are thousands of them here."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


class Do(Enum):
    """What can happen; the number of a step says to which card, which irqchip or which route."""

    FIRE = auto()
    FALL = auto()
    READ_ISR = auto()
    TOUCH = auto()
    ACKNOWLEDGE = auto()
    END = auto()
    ACTIVATE = auto()
    ACTIVATE_AND_GIVE_UP = auto()
    ROUTE = auto()
    RESET = auto()
    FLR = auto()
    MSIX = auto()
    INTX = auto()
    DISABLE = auto()
    ENABLE = auto()
    LOSE = auto()
    RECONNECT = auto()
    PASS_TIME = auto()


AFTER: Final = (None, None, None, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25)
"""A change of irqchip takes some forty turns."""

OFTEN: Final = (Do.FIRE, Do.ACKNOWLEDGE, Do.ACTIVATE, Do.READ_ISR, Do.END) * 4


@dataclass(frozen=True, slots=True)
class Step:
    """Something happens. The next step comes `after` so many turns of the scheduler, or once all is quiet."""

    do: Do
    number: int
    after: int | None


STEPS: Final = st.lists(
    st.builds(
        Step,
        st.sampled_from([*OFTEN, *Do]),
        st.integers(0, 4),
        st.sampled_from(AFTER),
    ),
    min_size=5,
    max_size=30,
)


class Story:
    """One example."""

    def __init__(self, clock: trio.testing.MockClock, nursery: trio.Nursery, machine: Machine) -> None:
        self._clock = clock
        self._nursery = nursery
        self._machine = machine
        self._changing = 0
        self._merged = 0
        self._excused = False
        self._commanded = False

    def _begin(self, driver: Driver, step: Step) -> None:
        machine, start = self._machine, self._nursery.start_soon
        match step.do:
            case Do.FIRE:
                driver.card.fire()
            case Do.FALL:
                driver.card.fall()
            case Do.READ_ISR:
                start(driver.read_isr)
            case Do.TOUCH:
                start(driver.touch)
            case Do.ACKNOWLEDGE:
                machine.acknowledge()
            case Do.END:
                self._excused |= self._changing > 0 or machine.outlasts or len(machine.drivers) > 1
                machine.end()
            case Do.ACTIVATE:
                self._change(self._activate, machine.chips[step.number % len(machine.chips)], None)
            case Do.ACTIVATE_AND_GIVE_UP:
                self._change(self._activate, machine.chips[step.number % len(machine.chips)], step.number)
            case Do.ROUTE:
                self._change(self._route, ROUTES[step.number])
            case Do.RESET | Do.FLR:
                start(partial(driver.reset, flr=step.do is Do.FLR))
            case Do.MSIX | Do.INTX:
                self._change(driver.use_msix, step.do is Do.MSIX)
            case Do.DISABLE | Do.ENABLE:
                self._commanded = True
                start(driver.command, step.do is Do.DISABLE)
            case Do.LOSE:
                driver.lose()
            case Do.RECONNECT:
                self._change(driver.reconnect)

    def _change(self, change: Callable[..., Awaitable[None]], *what: object) -> None:
        async def follow() -> None:
            await change(*what)
            self._changing -= 1

        self._changing += 1
        self._nursery.start_soon(follow)

    async def _activate(self, chip: Socketed, give_up_after: int | None) -> None:
        with trio.CancelScope() as scope:
            if give_up_after is not None:
                self._nursery.start_soon(self._cancel, scope, give_up_after)
            try:
                await self._machine.controller.activate(chip)
            except IrqchipError:
                assert not chip.starts or self._machine.route.gsi >= chip.inputs

    async def _route(self, route: IntxRoute) -> None:
        try:
            await self._machine.controller.set_route(self._machine.line, route)
        except IrqchipError:
            assert route.gsi >= self._machine.chip.inputs

    async def _cancel(self, scope: trio.CancelScope, after: int) -> None:
        await turns(after)
        scope.cancel()

    async def tell(self, steps: list[Step]) -> None:
        """All that happens, and then the end: everything is handled, and the line is as good as new."""
        drivers = self._machine.drivers
        for step in steps:
            if step.do is Do.PASS_TIME:
                await trio.testing.wait_all_tasks_blocked()
                self._clock.jump(MAPPINGS_BACK_S)
            self._begin(drivers[step.number % len(drivers)], step)
            if step.after is not None:
                await turns(step.after)
            else:
                await self._settle()
        await self._settle()
        await self._put_right()
        await self._work_off()
        for driver in drivers:
            driver.card.fire()
            await self._settle()
            assert await self._work_off() == 1, "one rise, one interrupt"
        self._clock.jump(MAPPINGS_BACK_S)
        await self._settle()
        for driver in drivers:
            before = driver.card.function.accesses
            await driver.touch()
            assert driver.card.function.accesses == before, "the mapping is used again"

    async def _put_right(self) -> None:
        """Give the line whatever it lacks to be heard."""
        for driver in self._machine.drivers:
            if driver.lost:
                await driver.reconnect()
            await driver.use_msix(False)
            await driver.command(False)
            await self._settle()
            if not self._machine.straight:
                await driver.touch()
                await self._settle()
                assert driver.card.lines.intx_masked == driver.card.high, "a BAR access ends the interrupt"
        await self._machine.controller.set_route(self._machine.line, ROUTES[0])
        await self._settle()

    async def _work_off(self) -> int:
        count = await self._machine.work_off()
        await self._settle()
        for driver in self._machine.drivers:
            card = driver.card
            assert not card.high
            assert not card.lines.intx_masked, "nobody would hear the next one"
            assert card.rises == card.seen + card.dropped
        return count

    async def _settle(self) -> None:
        """Once nobody can do anything more by himself, what must always hold holds."""
        await trio.testing.wait_all_tasks_blocked()
        assert self._changing == 0, "nobody waits for ever"
        machine = self._machine
        for driver in machine.drivers:
            card, lines = driver.card, driver.card.lines
            assert lines.intx_asserted == card.high
            assert card.rises == card.seen + card.dropped + card.high
            assert card.wired == driver.listens
            if card.wired:
                assert unread(driver.line.trigger_fd) == 0, "whoever is to hear it does"
                if lines.intx_masked and not lines.intx_disabled:
                    assert somebody_will_unmask(machine, driver)
                assert lines.intx_masked or not lines.intx_asserted
                assert driver.line.accelerated == machine.straight == machine.chip.has(driver.line.trigger_fd)
                assert not (driver.line.pending and driver.line.accelerated)
                assert driver.line.route == machine.controller.route(machine.line)
            if driver.silent_since is not None:
                assert card.told[driver.silent_since :] == [], "INTx is left alone while MSI-X is in use"
        for chip in machine.chips:
            for gsi, fd in chip.attached:
                assert (chip, gsi) == (machine.chip, machine.route.gsi)
                assert fd in [driver.line.trigger_fd for driver in machine.drivers]
            assert chip.levels == (machine.levels if chip is machine.chip else set())
        self._count()

    def _count(self) -> None:
        """Each signal was taken once: by an irqchip, by the slow path, or by a change that has it repeated.

        And none came before the one before was done with, unless two had the line speak: whoever owed an
        UNMASK, and a driver who cleared INTX_DISABLE since, or a CPU that ended an interrupt amid a change,
        or one from before, or one of both cards.
        """
        machine = self._machine
        signals = sum(driver.card.signals for driver in machine.drivers)
        own = [driver.line.counters for driver in machine.drivers]
        taken = sum(counters.triggered for counters in machine.counters)
        assert signals == taken + sum(counters.triggers + counters.drained for counters in own)
        merged = sum(counters.merged for counters in machine.counters)
        merged += sum(counters.merged for counters in own)
        assert merged == self._merged or self._excused or self._commanded
        self._merged, self._excused = merged, False
        self._commanded &= machine.chip.holds(machine.route.gsi) or any(
            driver.line.pending or driver.card.lines.intx_masked for driver in machine.drivers
        )


def somebody_will_unmask(machine: Machine, driver: Driver) -> bool:
    """A line that is masked waits for a CPU, which has an interrupt to handle, or for a BAR access."""
    if machine.routed:
        return machine.chip.holds(machine.route.gsi)
    return driver.line.pending


def unread(eventfd: int) -> int:
    """What the kernel says that an eventfd counts; nobody is disturbed."""
    for line in Path(f"/proc/self/fdinfo/{eventfd}").read_text("ascii").splitlines():
        if line.startswith("eventfd-count:"):
            return int(line.split(":")[1], 16)
    raise AssertionError(f"{eventfd} is no eventfd")


async def turns(count: int) -> None:
    """Let everybody else go on for so many turns of the scheduler."""
    for _ in range(count):
        await trio.lowlevel.checkpoint()


async def tell(steps: list[Step], clock: trio.testing.MockClock, cards: list[Card]) -> None:
    async with AsyncExitStack() as stack:
        pic = await stack.enter_async_context(open_pic())
        ioapic = await stack.enter_async_context(open_ioapic())
        other = await stack.enter_async_context(open_pic())
        chips = [
            Socketed(pic, "pic"),
            Socketed(ioapic, "ioapic"),
            Socketed(other, "one without eventfds at the end of interrupt", resample=False),
            Socketed(other, "one that refuses eventfds", attaches=False),
            Socketed(other, "one that cannot be activated", starts=False),
        ]
        machine = Machine(chips, cards)
        for driver in machine.drivers:
            await stack.enter_async_context(driver.running(machine.controller))
        nursery = await stack.enter_async_context(trio.open_nursery())
        await Story(clock, nursery, machine).tell(steps)


def innermost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of the errors: examples that fail by one and the same are told apart from others by it."""
    first = group.exceptions[0]
    return innermost(first) if isinstance(first, BaseExceptionGroup) else first


def run(steps: list[Step], cards: int) -> None:
    before = len(open_fds())
    clock = trio.testing.MockClock()
    made = [Card(f"card{number}") for number in range(cards)]
    try:
        trio.run(tell, steps, clock, made, clock=clock)
    except BaseExceptionGroup as group:
        raise innermost(group) from None
    for card in made:
        card.close()
    assert len(open_fds()) <= before


def stories(seed_of: int, count: int, cards: int) -> None:
    """So many, the same ones each time; another seed has others."""

    @seed(seed_of)
    @settings(max_examples=count, database=None)
    @given(STEPS, st.random_module())
    def true(steps: list[Step], schedule: object) -> None:
        run(steps, cards)

    true()


@pytest.mark.parametrize("part", range(PARTS))
def test_a_line_never_goes_deaf_and_nothing_is_heard_twice(part: int) -> None:
    stories(part, STORIES // PARTS, 1)


@pytest.mark.parametrize("part", range(PARTS_OF_TWO))
def test_two_cards_on_one_line_are_both_heard(part: int) -> None:
    stories(part, STORIES // PARTS, 2)
