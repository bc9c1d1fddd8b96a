"""Cards that fire as fast as they can, and an irqchip that changes under them ten thousand times.

Everything is counted on both sides: at the card, which knows when its line rose and what it signalled, and
at the irqchips, which know what they took and what a CPU made of it. Nothing may be missing in between.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Final

import pytest
import trio
import trio.testing

from client.irqchip import InterruptController, IntxMode, IntxRoute, Irqchip
from client.irqchip.intx import Intx
from client.irqchip.kvm import KvmIoapic, KvmPic
from client.irqchip.processor import Processor, open_processor
from client.irqchip.userspace import Ioapic, Pic, UserspaceChip
from client.kvm import Register, Vm, open_machine
from tests.client.irqchip.card import ISR, REGISTERS, Card
from tests.client.irqchip.machine import Driver

THOROUGH: Final = os.environ.get("CI", "").lower() == "true"
CHANGES: Final = 10_000 if THOROUGH else 400
"""An even number: the irqchip at the end is that of the beginning."""

IRQCHIPS: Final = 2
GSI: Final = 10
TURNS: Final = 7
"""Of the scheduler: one less is left between two changes at most, and none at times."""

PATIENCE_S: Final = 60
"""For a line to be heard once more; it takes less than a millisecond."""


@contextmanager
def by_a_thread(card: Card) -> Iterator[None]:
    """The line rises again as soon as a thread of the card's own sees that it is low."""
    stopping = threading.Event()

    def keep_firing() -> None:
        while not stopping.is_set():
            card.fire()
            card.let_go.wait()

    thread = threading.Thread(target=keep_firing)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        card.let_go.set()
        thread.join()


@contextmanager
def at_once(card: Card) -> Iterator[None]:
    """The line rises again while its ISR is being read: it is low at no other time."""
    card.eager = True
    card.fire()
    try:
        yield
    finally:
        card.eager = False


Firing = Callable[[Card], AbstractContextManager[None]]


class Handler:
    """Asks one card; counts."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.found = 0
        self.empty = 0
        self.asking = False
        """Whether an interrupt was taken, and the card has not said yet whether it is its own."""

    async def __call__(self) -> bool:
        self.asking = True
        found = await self.driver.read_isr()
        self.asking = False
        self.found += found
        self.empty += not found
        return found


class Counting(UserspaceChip):
    """Counts how often it was left when a CPU had not done with its interrupt."""

    handlers: Sequence[Handler] = ()
    left_amid = 0

    def deactivate(self) -> None:
        counters = self.counters[GSI]
        waits = counters.raised > counters.acknowledged + counters.withdrawn + counters.resampled
        self.left_amid += waits or any(handler.asking for handler in self.handlers)
        super().deactivate()


class CountingPic(Counting, Pic):
    """The 8259A pair."""


class CountingIoapic(Counting, Ioapic):
    """The I/O APIC."""


async def change(controller: InterruptController, chips: Sequence[Irqchip], changes: int) -> None:
    """From one irqchip to the other and back, at times without a pause."""
    for number, chip in enumerate(islice(cycle(chips[::-1]), changes), 1):
        await controller.activate(chip)
        for _ in range(number % TURNS):
            await trio.lowlevel.checkpoint()


def at_rest(cards: Sequence[Card]) -> bool:
    """Whether they want nothing, and would be heard."""
    return not any(card.high or card.lines.intx_masked for card in cards)


async def until(satisfied: Callable[[], bool]) -> None:
    """Nobody can tell: there are other threads."""
    with trio.fail_after(PATIENCE_S):
        while not satisfied():
            await trio.lowlevel.checkpoint()


def tell(what: str, seconds: float, cards: Sequence[Card], lines: Sequence[Intx]) -> None:
    """The figures of this machine, shown with -rP."""
    dark = [1e3 * each for line in lines for each in line.dark]
    interrupts = sum(card.seen for card in cards)
    print(  # noqa: T201
        f"{what}: {lines[0].counters.changes} changes and {interrupts} interrupts in {seconds:.1f} s, "
        f"{interrupts / seconds:.0f} a second; dark {statistics.median(dark):.2f} ms, {max(dark):.1f} at most"
    )


async def stress(firing: Firing, cards: Sequence[Card], changes: int, *, thread: bool = False) -> None:
    """Two irqchips of ours, and a CPU of ours."""
    async with AsyncExitStack() as stack:
        chips: list[CountingPic | CountingIoapic] = [CountingPic(), CountingIoapic()]
        for chip in chips:
            chip.program()
            await stack.enter_async_context(chip.watched())
        controller = InterruptController(chips[0], [IntxRoute(IntxMode.ENABLED, GSI)])
        cpu = await stack.enter_async_context(open_processor(controller))
        handlers = [Handler(Driver(card, thread=thread)) for card in cards]
        for handler in handlers:
            await stack.enter_async_context(handler.driver.running(controller))
            assert handler.driver.line.line is not None
            stack.enter_context(cpu.handling(handler.driver.line.line, handler))
        for chip in chips:
            chip.handlers = handlers
        with ExitStack() as fired:
            for card in cards:
                fired.enter_context(firing(card))
            began = time.perf_counter()
            await change(controller, chips, changes)
            seconds = time.perf_counter() - began
        await until(partial(at_rest, cards))
        await controller.activate(chips[1])
        await trio.testing.wait_all_tasks_blocked()  # what its local APIC had kept is taken
        tell(firing.__name__, seconds, cards, [handler.driver.line for handler in handlers])
        account(cpu, chips, handlers, changes + 1)
        for card in cards:
            card.fire()
            await until(partial(at_rest, [card]))


def account(cpu: Processor, chips: Sequence[Counting], handlers: Sequence[Handler], changes: int) -> None:
    """Nothing is lost, and nothing is doubled."""
    cards = [handler.driver.card for handler in handlers]
    lines = [handler.driver.line.counters for handler in handlers]
    inputs = [chip.counters[GSI] for chip in chips]
    for handler, card, line in zip(handlers, cards, lines, strict=True):
        assert card.rises == card.seen == handler.found, "each rise was seen, and once"
        assert card.empty == handler.empty
        assert line.changes == changes
        assert line.fallbacks == 0
        assert handler.found >= changes / 10, "it was heard all along"
    signals = sum(card.lines.signals for card in cards)
    heard = sum(line.triggers + line.drained for line in lines)
    assert signals == heard + sum(each.triggered for each in inputs), "each signal was taken, and once"
    acknowledged = sum(each.acknowledged for each in inputs)
    assert acknowledged == sum(each.ended for each in inputs)
    assert cpu.handled + cpu.spurious == acknowledged + sum(chip.spurious for chip in chips)
    withdrawn = sum(each.withdrawn + each.resampled for each in inputs)
    assert sum(each.raised for each in inputs) <= acknowledged + withdrawn, "each rise of an input was heard"
    if len(cards) == 1:
        assert acknowledged == handlers[0].found + handlers[0].empty
        assert handlers[0].empty <= sum(chip.left_amid for chip in chips), "changes explain what was nothing"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("firing", [by_a_thread, at_once])
@pytest.mark.parametrize("server", ["our loop", "a thread"])
async def test_a_card_that_fires_as_fast_as_it_can_is_heard_through_every_change(
    firing: Firing, server: str
) -> None:
    card = Card()
    await stress(firing, [card], CHANGES, thread=server == "a thread")
    assert firing is not at_once or card.empty <= IRQCHIPS, "those that each still had when it stopped firing"
    card.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("firing", [by_a_thread, at_once])
async def test_two_cards_on_one_line_are_both_heard_through_every_change(firing: Firing) -> None:
    cards = [Card("one"), Card("other")]
    await stress(firing, cards, CHANGES // 4)
    for card in cards:
        card.close()


@pytest.mark.vcpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("firing", [by_a_thread, at_once])
async def test_a_guest_hears_a_card_through_every_change_of_kvms_irqchips(firing: Firing) -> None:
    card = Card()
    driver = Driver(card)
    with Vm() as vm:
        chips = [KvmPic(vm), KvmIoapic(vm)]
        async with AsyncExitStack() as stack:
            controller = InterruptController(chips[0], [IntxRoute(IntxMode.ENABLED, GSI)])
            await stack.enter_async_context(driver.running(controller))
            assert driver.link is not None
            isr = Register(driver.link.session, REGISTERS, ISR)
            guest = await stack.enter_async_context(open_machine(vm, [isr], inputs=[GSI]))
            with firing(card):
                began = time.perf_counter()
                await change(controller, chips, CHANGES)
                seconds = time.perf_counter() - began
            await until(partial(at_rest, [card]))
            await until(lambda: guest.total == card.seen + card.empty)
            tell(f"KVM, {firing.__name__}", seconds, [card], [driver.line])
            assert card.rises == card.seen == guest.nonzero(GSI), "each rise was seen, and once"
            assert guest.interrupts(GSI) == guest.total
            assert card.empty + guest.spurious <= CHANGES, "changes explain what was nothing"
            assert firing is not at_once or card.empty <= IRQCHIPS
            counters = driver.line.counters
            assert (counters.changes, counters.fallbacks, guest.unread) == (CHANGES, 0, 0)
            assert card.seen >= CHANGES / 10, "it was heard all along"
            card.fire()
            await until(partial(at_rest, [card]))
        for chip in chips:
            chip.close()
    card.close()
