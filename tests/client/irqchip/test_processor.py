from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from client import ClientError
from client.irqchip import InterruptController, IntxMode, IntxRoute, Irqchip
from client.irqchip.processor import Processor, open_processor
from client.irqchip.userspace import Ioapic, Pic, open_ioapic, open_pic
from tests.client.irqchip.userspace.test_chip import devices

ROUTES = [IntxRoute(IntxMode.ENABLED, gsi) for gsi in (10, 11, 10)]


class Card:
    """Holds its line until its handler has been called."""

    def __init__(self, controller: InterruptController, line: int, *, mine: bool = True) -> None:
        self.controller = controller
        self.line = line
        self.mine = mine
        self.calls = 0

    def interrupt(self) -> None:
        self.controller.assert_line(self.line, self)

    async def handler(self) -> bool:
        self.calls += 1
        self.controller.deassert_line(self.line, self)
        return self.mine


class Elsewhere(Irqchip):
    """An irqchip whose CPU is not here."""

    def __init__(self) -> None:
        self.name = "elsewhere"
        self.inputs = 24

    def activate(self) -> None:
        """It is."""

    def deactivate(self) -> None:
        """It is not."""

    def attach(self, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        """It is attached."""

    def detach(self, gsi: int, trigger_fd: int) -> None:
        """It is not."""

    def set_level(self, gsi: int, level: bool) -> None:
        """It is high, or not."""


@asynccontextmanager
async def machine() -> AsyncIterator[tuple[InterruptController, Processor, Pic, Ioapic]]:
    async with open_pic() as pic, open_ioapic() as ioapic:
        controller = InterruptController(pic, ROUTES)
        async with open_processor(controller) as cpu:
            yield controller, cpu, pic, ioapic


async def test_a_handler_is_called_for_each_interrupt_of_its_line_and_no_other() -> None:
    async with machine() as (controller, cpu, pic, _):
        card, other = Card(controller, 0), Card(controller, 1)
        with cpu.handling(0, card.handler), cpu.handling(1, other.handler):
            for _ in range(3):
                card.interrupt()
                await wait_all_tasks_blocked()
        assert (card.calls, other.calls) == (3, 0)
        assert (cpu.handled, cpu.spurious) == (3, 0)
        assert cpu.counters[10].handled == 3
        assert pic.state().isr == 0


async def test_all_lines_of_an_input_have_their_handlers_called() -> None:
    async with machine() as (controller, cpu, _, _):
        cards = [Card(controller, line, mine=mine) for line, mine in ((0, False), (2, True), (2, False))]
        with (
            cpu.handling(0, cards[0].handler),
            cpu.handling(2, cards[1].handler),
            cpu.handling(2, cards[2].handler),
        ):
            cards[1].interrupt()
            await wait_all_tasks_blocked()
        assert [card.calls for card in cards] == [1, 1, 1]
        assert (cpu.handled, cpu.spurious) == (1, 0)


async def test_what_no_handler_knows_is_spurious() -> None:
    with devices() as (device,):
        async with machine() as (controller, cpu, pic, _):
            pic.attach(10, device.trigger_fd, device.resample_fd)
            await device.fire()
            with cpu.handling(0, Card(controller, 0, mine=False).handler):
                await device.fire()
            with cpu.handling(1, Card(controller, 1).handler):
                await device.fire()
            assert (cpu.handled, cpu.spurious) == (0, 3)
            assert cpu.counters[10].spurious == 3
            assert device.resampled == 3


async def test_what_the_irqchip_took_back_before_it_was_asked_is_spurious() -> None:
    async with machine() as (_, cpu, pic, _):
        pic.set_level(10, True)
        pic.set_level(10, False)
        await wait_all_tasks_blocked()
        assert (cpu.handled, cpu.spurious, pic.spurious) == (0, 1, 1)
        assert not cpu.counters


async def test_interrupts_are_handled_one_after_the_other_and_the_highest_first() -> None:
    async with machine() as (controller, cpu, _, _):
        cards = {line: Card(controller, line) for line in (1, 0)}
        log: list[str] = []

        async def slow(line: int) -> bool:
            log.append(f"{line} begins")
            await cards[line].handler()
            await wait_all_tasks_blocked()
            log.append(f"{line} ends")
            return True

        with cpu.handling(0, lambda: slow(0)), cpu.handling(1, lambda: slow(1)):
            for card in cards.values():
                card.interrupt()
            while cpu.handled < 2:
                await wait_all_tasks_blocked()
        assert log == ["0 begins", "0 ends", "1 begins", "1 ends"]


async def test_what_a_handler_raises_comes_out_of_the_block_after_the_interrupt_was_ended() -> None:
    with devices() as (device,):
        async with open_pic() as pic:
            controller = InterruptController(pic, ROUTES)

            async def fail() -> bool:
                raise ValueError("the driver")

            pic.attach(10, device.trigger_fd, device.resample_fd)

            async def work() -> None:
                async with open_processor(controller) as cpu:
                    with cpu.handling(0, fail):
                        await device.fire()
                        await trio.sleep_forever()

            with pytest.raises(ValueError, match="the driver"):
                await work()
            assert device.resampled == 1
            assert pic.state().isr == 0
            assert len(controller.irqchip_change) == 0


async def test_a_handler_that_is_still_at_it_when_the_block_ends_leaves_no_interrupt_in_service() -> None:
    async with open_pic() as pic:
        controller = InterruptController(pic, ROUTES)
        async with open_processor(controller) as cpu:

            async def endless() -> bool:
                await trio.sleep_forever()
                return True

            with cpu.handling(0, endless):
                controller.assert_line(0, "card")
                await wait_all_tasks_blocked()
                assert pic.state().isr >> 10 & 1
        assert pic.state().isr == 0


async def test_an_interrupt_is_ended_where_it_came_from_although_the_irqchip_changed() -> None:
    with devices() as (device,):
        async with machine() as (controller, cpu, pic, ioapic):
            pic.attach(10, device.trigger_fd, device.resample_fd)
            go_on = trio.Event()

            async def slow() -> bool:
                await go_on.wait()
                return True

            with cpu.handling(0, slow):
                await device.fire()
                await controller.activate(ioapic)
                assert pic.state().isr >> 10 & 1
                assert device.resampled == 0
                go_on.set()
                await wait_all_tasks_blocked()
                assert device.resampled == 1
                assert pic.state().isr == 0
                card = Card(controller, 1)
                with cpu.handling(1, card.handler):
                    card.interrupt()
                    await wait_all_tasks_blocked()
            assert card.calls == 1
            assert ioapic.counters[11].ended == 1
            assert cpu.handled == 2


async def test_it_follows_from_irqchip_to_irqchip_and_rests_where_the_cpu_is_elsewhere() -> None:
    async with machine() as (controller, cpu, pic, ioapic):
        card = Card(controller, 0)
        with cpu.handling(0, card.handler):
            for calls, chip in enumerate((ioapic, pic, ioapic), 1):
                await controller.activate(chip)
                card.interrupt()
                await wait_all_tasks_blocked()
                assert card.calls == calls
            await controller.activate(Elsewhere())
            card.interrupt()
            await wait_all_tasks_blocked()
            assert card.calls == 3
            await controller.activate(pic)
            await wait_all_tasks_blocked()
            assert card.calls == 4


async def test_a_handler_follows_its_line_to_another_input() -> None:
    async with machine() as (controller, cpu, _, _):
        card = Card(controller, 0)
        with cpu.handling(0, card.handler):
            await controller.set_route(0, IntxRoute(IntxMode.ENABLED, 5))
            card.interrupt()
            await wait_all_tasks_blocked()
            assert cpu.counters[5].handled == 1


async def test_a_line_that_is_none_has_no_handler() -> None:
    async with machine() as (controller, cpu, _, _):
        for line in (-1, 4):
            with pytest.raises(ClientError), cpu.handling(line, Card(controller, 0).handler):
                pass


async def test_a_handler_is_called_no_more_once_its_block_is_over() -> None:
    with devices() as (device,):
        async with machine() as (controller, cpu, pic, _):
            card = Card(controller, 0)
            with cpu.handling(0, card.handler):
                pass
            pic.attach(10, device.trigger_fd, device.resample_fd)
            await device.fire()
            assert card.calls == 0
            assert cpu.spurious == 1


async def test_a_handler_whose_block_is_over_is_not_called_for_what_another_is_busy_with() -> None:
    busy, go_on = trio.Event(), trio.Event()

    async def slow() -> bool:
        busy.set()
        await go_on.wait()
        return False

    async with machine() as (controller, cpu, _, _):
        card = Card(controller, 0)
        with cpu.handling(0, slow):
            with cpu.handling(0, card.handler):
                card.interrupt()
                await busy.wait()
            controller.deassert_line(0, card)
            go_on.set()
            await wait_all_tasks_blocked()
        assert card.calls == 0
        assert cpu.spurious == 1
