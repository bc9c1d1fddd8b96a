"""A driver whose INTx goes through the irqchip of a machine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

import client
from client.irqchip import InterruptController, Intx, IntxMode, IntxRoute
from client.irqchip.processor import Processor, open_processor
from client.irqchip.userspace import Ioapic, Pic, open_ioapic, open_pic
from client.virtio import NetDriver, Slot, Wiring, open_net
from client.virtio.transport import Isr
from tests.client.virtio.fake_nic import FakeNic, session_with_nic
from tests.client.virtio.test_moving import movable
from tests.descriptors import open_fds, settled_fds

GSI = 11
PIN = 0x3D


@dataclass
class Machine:
    """Two irqchips, the PIC active, and a processor for either."""

    pic: Pic
    ioapic: Ioapic
    controller: InterruptController
    cpu: Processor

    @property
    def slot(self) -> Slot:
        """Slot 2, where INTA is the third line of the root bus."""
        return Slot(self.cpu, 2)

    async def change(self) -> None:
        """Make the other irqchip the active one."""
        await self.controller.activate(self.ioapic if self.controller.chip is self.pic else self.pic)


@asynccontextmanager
async def machine() -> AsyncIterator[Machine]:
    with trio.fail_after(20):
        async with open_pic() as pic, open_ioapic() as ioapic:
            controller = InterruptController(pic)
            await controller.set_route(2, IntxRoute(IntxMode.ENABLED, GSI))
            async with open_processor(controller) as cpu:
                yield Machine(pic, ioapic, controller, cpu)


@asynccontextmanager
async def plugged_in(nic: FakeNic, host: Machine) -> AsyncIterator[NetDriver]:
    async with (
        session_with_nic(nic) as session,
        open_net(session, wiring=Wiring.INTX, slot=host.slot) as driver,
    ):
        yield driver


class Quiet:
    """Another device on a line; lets it go when it is asked."""

    def __init__(self, host: Machine, line: int) -> None:
        self.host = host
        self.line = line
        self.calls = 0

    async def __call__(self) -> bool:
        self.calls += 1
        self.host.controller.deassert_line(self.line, self)
        return True


def line_of(driver: NetDriver) -> Intx:
    assert driver.line is not None
    return driver.line


async def go_round(driver: NetDriver, numbers: range) -> None:
    for number in numbers:
        frame = number.to_bytes(4, "big") * 16
        await driver.send(frame)
        assert await driver.receive() == frame


async def test_frames_go_round_whichever_irqchip_is_active() -> None:
    async with machine() as host, plugged_in(FakeNic(), host) as driver:
        line = line_of(driver)
        assert line.accelerated
        for change in range(20):
            await go_round(driver, range(change * 10, change * 10 + 10))
            await host.change()
            assert line.failure is None
            assert line.accelerated
        assert line.counters.changes == 20
        assert driver.counters.interrupts > 0
        assert host.pic.counters[GSI].acknowledged > 0
        assert host.ioapic.counters[GSI].acknowledged > 0


async def test_the_link_is_heard_of_through_the_irqchip() -> None:
    nic = FakeNic()
    async with machine() as host, plugged_in(nic, host) as driver, trio.open_nursery() as nursery:
        nursery.start_soon(driver.wait_config_change)
        await trio.testing.wait_all_tasks_blocked()
        nic.link = 0
        nic.change_config()
        while driver.link_up:
            await trio.lowlevel.checkpoint()


async def test_an_irqchip_that_tells_no_end_of_interrupt_will_do() -> None:
    async with machine() as host:
        host.pic.resample = False
        async with plugged_in(FakeNic(), host) as driver:
            assert not line_of(driver).accelerated
            await go_round(driver, range(50))
            await host.change()
            assert line_of(driver).accelerated
            await go_round(driver, range(50, 100))


async def test_a_card_that_moves_takes_its_line_along() -> None:
    old, new = movable(), movable()
    new.origin = old
    async with machine() as host, session_with_nic(new) as second, plugged_in(old, host) as driver:
        await go_round(driver, range(20))
        first_line = line_of(driver)
        await driver.migrate_to(second)
        assert line_of(driver) is not first_line
        assert not first_line.enabled
        assert (len(host.controller.irqchip_change), len(host.controller.routing_change)) == (2, 1)
        await host.change()
        await go_round(driver, range(20, 40))
        assert first_line.counters.changes == 0


async def test_a_card_without_an_interrupt_pin_is_refused_and_leaves_nothing() -> None:
    nic = FakeNic()
    nic.config[PIN] = 0
    before = settled_fds()
    async with machine() as host:
        with pytest.raises(client.ClientError, match="no interrupt pin"):
            async with plugged_in(nic, host):
                pass
        assert len(host.controller.routing_change) == 0
    assert open_fds() == before


async def test_a_driver_that_ends_leaves_nothing_in_the_irqchip() -> None:
    before = settled_fds()
    nic = FakeNic()
    async with machine() as host, session_with_nic(nic) as session:
        with trio.CancelScope() as scope:
            async with open_net(session, wiring=Wiring.INTX, slot=host.slot) as driver:
                await go_round(driver, range(5))
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert (len(host.controller.irqchip_change), len(host.controller.routing_change)) == (1, 0)
        assert (nic.intx_fd, nic.unmask_fd) == (-1, -1)
        await host.change()
    assert open_fds() == before


async def move_while_asked(isr: Callable[[NetDriver, client.Session], Awaitable[Isr]]) -> None:
    """A card that is moved while its driver reads the ISR of the old one, which `isr` answers."""
    old, new = movable(), movable()
    new.origin = old
    async with machine() as host, session_with_nic(new) as second, plugged_in(old, host) as driver:
        await go_round(driver, range(5))
        asked = trio.Event()

        async def answer() -> Isr:
            asked.set()
            return await isr(driver, second)

        driver._attachment.transport.isr = answer  # type: ignore[method-assign]
        line = line_of(driver).line
        assert line is not None
        host.controller.assert_line(line, "somebody else")
        await asked.wait()
        await driver.migrate_to(second)
        host.controller.deassert_line(line, "somebody else")
        await go_round(driver, range(5, 10))


async def test_a_card_that_is_left_while_it_does_not_answer_holds_up_no_processor() -> None:
    async def hangs(driver: NetDriver, second: client.Session) -> Isr:
        await trio.sleep_forever()

    await move_while_asked(hangs)


async def test_a_card_that_is_left_fails_no_driver_when_its_server_goes() -> None:
    async def goes(driver: NetDriver, second: client.Session) -> Isr:
        with trio.CancelScope(shield=True):
            while driver.session is not second:
                await trio.lowlevel.checkpoint()
        raise client.Disconnected("the server is gone")

    await move_while_asked(goes)


async def test_interrupts_of_others_on_the_line_are_not_counted() -> None:
    async with machine() as host, plugged_in(FakeNic(), host) as driver:
        await go_round(driver, range(5))
        await trio.testing.wait_all_tasks_blocked()
        before = driver.counters.interrupts
        line = line_of(driver).line
        assert line is not None
        with host.cpu.handling(line, quiet := Quiet(host, line)):
            host.controller.assert_line(line, quiet)
            await trio.testing.wait_all_tasks_blocked()
        assert quiet.calls == 1
        assert driver.counters.interrupts == before
