"""Everything that can happen to two cards and what they share, in any order and at any moment: a card's
memory is nobody's while it is not decoded, what a card writes is where it belongs or was refused, and nothing
stays behind.

What is true is read from the cards (their windows, their bytes, their pins) and from the kernel: never from
what the client believes alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Final

import pytest
import trio
import trio.testing
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from client.container import Mode, open_container
from device.revocation import Revocation
from tests.client.peering.engine import Engine
from tests.client.peering.processes import lent_areas
from tests.client.peering.story import STEPS, Do, Side, Step, Story
from tests.descriptors import open_fds

THOROUGH: Final = os.environ.get("CI", "").lower() == "true"
STORIES: Final = 100 if THOROUGH else 40
PARTS: Final = 3


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """What is logged of refusals is not kept: there are thousands of them here."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


async def tell(
    steps: list[Step], mode: Mode, clock: trio.testing.MockClock, engines: tuple[Engine, Engine]
) -> None:
    failure: BaseException | None = None
    async with trio.open_nursery() as links, AsyncExitStack() as stack:
        a, b = (Side(engine, links) for engine in engines)
        for side in (a, b):
            await side.connect()
            stack.push_async_callback(side.leave)
        mappings = await stack.enter_async_context(AsyncExitStack())
        container = await stack.enter_async_context(open_container(mode))
        await container.attach(a.session)
        nursery = await stack.enter_async_context(trio.open_nursery())
        try:
            await Story(clock, nursery, container, a, b, mappings).tell(steps)
            nursery.cancel_scope.cancel()
        except BaseException as error:
            failure = error
            links.cancel_scope.cancel()  # nothing is put right any more
    if failure is not None:
        raise failure


def innermost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first of the errors: examples that fail by one and the same are told apart from others by it."""
    first = group.exceptions[0]
    return innermost(first) if isinstance(first, BaseExceptionGroup) else first


def run(steps: list[Step], mode: Mode, revocation: Revocation) -> None:
    files, lent = len(open_fds()), lent_areas()
    engines = Engine("a"), Engine("b", revocation)
    made = lent_areas()
    clock = trio.testing.MockClock(autojump_threshold=0)
    try:
        trio.run(tell, steps, mode, clock, engines, clock=clock)
    except BaseExceptionGroup as group:
        raise innermost(group) from None
    a, b = engines
    assert a.function.dma.windows() == b.function.dma.windows() == []
    assert a.function.dma.pins.acquired == a.function.dma.pins.released
    assert lent_areas() == made, "a mapping is left"
    for engine in engines:
        engine.close()
    assert len(open_fds()) <= files
    assert lent_areas() == lent


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("mode", [Mode.TYPE1V2, Mode.IOMMUFD], ids=lambda mode: mode.value)
@pytest.mark.parametrize("revocation", Revocation, ids=lambda way: way.value)
def test_memory_that_is_not_decoded_is_nobodys_and_nothing_stays_behind(
    revocation: Revocation, mode: Mode, part: int
) -> None:
    @seed(part)
    @settings(max_examples=STORIES, database=None)
    @given(STEPS, st.random_module())
    def true(steps: list[Step], schedule: object) -> None:
        run(steps, mode, revocation)

    true()


@pytest.mark.parametrize("do", [Do.DETACH, Do.UNMAP, Do.OFF, Do.PROTECT], ids=lambda do: do.name.lower())
@pytest.mark.parametrize("kind", [Do.MAP_RANGE, Do.MAP_EXPORT], ids=lambda do: do.name.lower())
@pytest.mark.parametrize("lets_go", [False, True], ids=["too late", "in time"])
def test_a_card_that_holds_on_to_pins_keeps_no_window(do: Do, kind: Do, lets_go: bool) -> None:
    run(
        [
            Step(kind, 0, None),
            Step(Do.PIN, 0, None),
            Step(do, 0, None),
            Step(Do.UNPIN if lets_go else Do.PASS_TIME, 0, None),
            Step(Do.UNPIN, 0, None),
            Step(Do.OFF, 0, None),
            Step(Do.DMA, 0, None),
            Step(Do.ON, 1, None),
            Step(Do.DMA, 0, None),
        ],
        Mode.TYPE1V2,
        Revocation.COOPERATIVE,
    )
