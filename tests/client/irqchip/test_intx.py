from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import trio
import trio.testing

import client
from client.irqchip import NOWHERE, InterruptController, IntxMode, IntxRoute, open_intx
from client.irqchip.intx import DARK_KEPT
from client.irqchip.processor import open_processor
from client.irqchip.userspace import open_ioapic, open_pic
from tests.client.irqchip.scripted import (
    AUTOMASKED,
    EDGES,
    INPUT,
    ISR,
    Does,
    Place,
    Server,
    nothing_left,
    settled,
)

APART = ["MASK", "xics detach 5", "UNMASK"]
TOGETHER = ["MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]
TO_XIVE = ["xics deactivate", "xive activate"]


def renamed(said: list[str]) -> list[str]:
    """The same with xics for xive and the other way round."""
    other = {"xics": "xive", "xive": "xics"}
    return [" ".join(other.get(word, word) for word in line.split()) for line in said]


@pytest.fixture
def place() -> Iterator[Place]:
    with nothing_left() as made:
        yield made


async def test_the_line_is_wired_then_masked_attached_and_let_go(place: Place) -> None:
    async with place.device() as (session, _), open_intx(session, place.controller) as intx:
        assert not intx.enabled
        assert (intx.trigger_fd, intx.resample_fd) == (-1, -1)
        assert place.said() == []
        await intx.enable()
        assert place.said() == ["TRIGGER", *renamed(TOGETHER)]
        assert intx.enabled
        assert intx.accelerated
        assert (intx.pin, intx.line, intx.route) == (1, 0, IntxRoute(IntxMode.ENABLED, INPUT))
        assert min(intx.trigger_fd, intx.resample_fd) >= 0
        await intx.enable()
        assert place.said() == [], "it is enabled already"


async def test_from_one_irqchip_to_another_and_back(place: Place) -> None:
    async with place.intx() as (intx, _):
        await place.controller.activate(place.xive)
        assert place.said() == [*TO_XIVE, *APART, *TOGETHER]
        assert intx.accelerated
        await place.controller.activate(place.xics)
        assert place.said() == renamed([*TO_XIVE, *APART, *TOGETHER])
        assert intx.accelerated
        assert intx.failure is None
        assert intx.counters.changes == len(intx.dark) == 2
        assert (intx.counters.fallbacks, intx.counters.triggers, intx.counters.ends) == (0, 0, 0)


async def test_the_end_of_the_block_takes_it_all_back(place: Place) -> None:
    async with place.intx():
        pass
    assert place.said() == ["MASK", "xics detach 5", "UNMASK", "DISABLE"]


async def test_a_line_that_is_disabled_says_nothing_and_can_be_enabled_again(place: Place) -> None:
    async with place.intx() as (intx, _):
        await intx.disable()
        assert place.said() == ["MASK", "xics detach 5", "UNMASK", "DISABLE"]
        assert (intx.enabled, intx.accelerated, intx.trigger_fd) == (False, False, -1)
        await intx.disable()
        assert place.said() == [], "it is disabled already"
        await intx.enable()
        assert place.said() == ["TRIGGER", *renamed(TOGETHER)]


async def test_while_msix_is_in_use_no_change_sends_a_message(place: Place) -> None:
    async with place.intx() as (intx, _):
        await intx.disable()
        place.said()
        await place.controller.activate(place.xive)
        await place.controller.set_route(0, IntxRoute(IntxMode.ENABLED, 6))
        assert place.said() == TO_XIVE
        assert intx.counters.changes == 0
        await intx.enable()
        assert place.said() == ["TRIGGER", "MASK", "xive attach 6", "UNMASK|EVENTFD", "UNMASK"]


async def test_another_route_is_followed_and_the_same_is_not(place: Place) -> None:
    async with place.intx() as (intx, _):
        await place.controller.set_route(0, IntxRoute(IntxMode.ENABLED, INPUT))
        await place.controller.set_route(1, IntxRoute(IntxMode.ENABLED, 9))
        assert place.said() == [], "it goes where it went, and the other line is not ours"
        await place.controller.set_route(0, IntxRoute(IntxMode.ENABLED, 9))
        assert place.said() == [*APART, "MASK", "xics attach 9", "UNMASK|EVENTFD", "UNMASK"]
        assert intx.route.gsi == 9
        assert intx.counters.changes == 1


@pytest.mark.parametrize("route", [NOWHERE, IntxRoute(IntxMode.INVERTED, 5)])
async def test_a_route_that_is_none_or_inverted_means_the_slow_path(place: Place, route: IntxRoute) -> None:
    async with place.intx() as (intx, _):
        await place.controller.set_route(0, route)
        said = place.said()
        assert [each for each in said if "level" not in each] == APART
        assert not intx.accelerated
        assert intx.failure is None
        assert intx.counters.fallbacks == 0, "there is no fast one there"
        await place.controller.set_route(0, IntxRoute(IntxMode.ENABLED, 5))
        assert [each for each in place.said() if "level" not in each] == renamed(TOGETHER)
        assert intx.accelerated


async def test_without_the_wish_for_it_there_is_no_fast_path(place: Place) -> None:
    async with place.device() as (session, _), open_intx(session, place.controller, bypass=False) as intx:
        await intx.enable()
        assert place.said() == ["TRIGGER"]
        await place.controller.activate(place.xive)
        assert place.said() == TO_XIVE
        assert (intx.accelerated, intx.counters.fallbacks, len(intx.dark)) == (False, 0, 0)
        await intx.disable()
        assert place.said() == ["DISABLE"]


async def test_an_irqchip_without_resample_is_worth_one_warning(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.xive.resample = False
    async with place.intx() as (intx, server):
        with caplog.at_level(logging.WARNING):
            await place.controller.activate(place.xive)
        assert len(caplog.records) == 1
        assert "INTA of the device in slot 0: irqchip xive" in caplog.text
        assert place.said() == [*TO_XIVE, *APART]
        assert not intx.accelerated
        assert intx.counters.fallbacks == 1
        server.raise_line()
        await settled()
        assert intx.pending
        assert place.said() == ["xive level 5 1"]


async def test_a_device_without_a_pin_subscribes_to_nothing(place: Place) -> None:
    async with place.device(pin=0) as (session, _), open_intx(session, place.controller) as intx:
        assert len(place.controller.irqchip_change) == len(place.controller.routing_change) == 0
        assert (intx.pin, intx.line) == (0, None)
        with pytest.raises(client.ClientError, match="no interrupt pin"):
            await intx.enable()
        await place.controller.activate(place.xive)
        await intx.disable()
        assert len(session.trapping) == 0
    assert place.said() == TO_XIVE


@pytest.mark.parametrize(("slot", "pin", "line"), [(0, 1, 0), (3, 1, 3), (3, 2, 0), (31, 4, 2)])
async def test_the_line_is_that_of_slot_and_pin(place: Place, slot: int, pin: int, line: int) -> None:
    async with place.device(pin=pin) as (session, _), open_intx(session, place.controller, slot=slot) as intx:
        assert intx.line == line
        assert len(place.controller.irqchip_change) == len(place.controller.routing_change) == 1


async def test_a_pin_that_is_none_is_refused_before_anybody_subscribes(place: Place) -> None:
    async with place.device(pin=5) as (session, _):
        with pytest.raises(client.ClientError, match="interrupt pin 5"):
            await open_intx(session, place.controller).__aenter__()


async def test_a_device_with_a_pin_and_no_intx_to_it_is_not_enabled(place: Place) -> None:
    async with place.device(lines=0) as (session, _), open_intx(session, place.controller) as intx:
        with pytest.raises(client.ClientError, match="the device has 0"):
            await intx.enable()
        assert not intx.enabled
        await place.controller.activate(place.xive)
        assert place.said() == TO_XIVE


async def test_a_server_that_takes_no_descriptors_has_no_intx(place: Place) -> None:
    capabilities = b'{"capabilities":{"max_msg_fds":0}}\0'
    async with (
        place.device(capabilities=capabilities) as (session, _),
        open_intx(session, place.controller) as intx,
    ):
        with pytest.raises(client.ClientError, match="takes no descriptors"):
            await intx.enable()
        assert not intx.enabled
        assert place.said() == []


async def test_a_subscription_lasts_as_long_as_the_block_however_it_ends(place: Place) -> None:
    async with place.device() as (session, _):

        async def fail() -> None:
            async with open_intx(session, place.controller) as intx:
                await intx.enable()
                assert len(place.controller.irqchip_change) == len(place.controller.routing_change) == 1
                raise LookupError

        with pytest.raises(LookupError):
            await fail()
        assert len(place.controller.irqchip_change) == len(place.controller.routing_change) == 0
        assert place.said()[-1] == "DISABLE"
        with trio.CancelScope() as scope:
            async with open_intx(session, place.controller) as intx:
                await intx.enable()
                scope.cancel()
                await trio.sleep_forever()
        assert len(place.controller.irqchip_change) == len(place.controller.routing_change) == 0
        assert place.said()[-1] == "DISABLE"


async def test_a_device_that_goes_amid_a_change_goes_after_it(place: Place) -> None:
    async with place.device() as (session, server), trio.open_nursery() as nursery:
        leave = trio.Event()

        async def use() -> None:
            async with open_intx(session, place.controller) as intx:
                await intx.enable()
                await leave.wait()

        nursery.start_soon(use)
        await settled()
        place.said()
        server.script = {3: Does.IGNORE}
        nursery.start_soon(place.controller.activate, place.xive)
        await settled()
        leave.set()
        await settled()
        assert list(place.xive.attached) == [5]
        server.wake()
        await settled()
        assert place.said() == [*TO_XIVE, *APART, *TOGETHER, "MASK", "xive detach 5", "UNMASK", "DISABLE"]
        assert len(place.controller.irqchip_change) == 0


async def test_a_line_that_is_high_when_it_is_enabled_is_heard_once(place: Place) -> None:
    async with place.device() as (session, server), open_intx(session, place.controller) as intx:
        server.raise_line()
        await intx.enable()
        assert place.xics.take() == 1
        assert server.signals == 1 + intx.counters.drained + intx.counters.triggers


@pytest.mark.parametrize("step", [0, 2])
async def test_what_is_signalled_while_a_mask_is_on_its_way_is_said_again_and_heard_once(
    place: Place, step: int
) -> None:
    async with place.intx() as (intx, server), trio.open_nursery() as nursery:
        server.script = {step: Does.IGNORE}
        nursery.start_soon(place.controller.activate, place.xive)
        await settled()
        server.raise_line()
        server.wake()
        await settled()
        assert place.xive.take() == 1
        assert intx.counters.drained >= 1
        assert intx.counters.merged == 0
        assert server.signals == 1 + intx.counters.drained + intx.counters.triggers


async def test_an_interrupt_that_was_signalled_before_the_change_is_heard_once_by_the_new_irqchip(
    place: Place,
) -> None:
    async with place.intx() as (intx, server):
        server.raise_line()  # xics has not taken it
        await place.controller.activate(place.xive)
        assert place.xive.take() == 1
        assert server.signals == 1 + intx.counters.drained + intx.counters.triggers
        assert place.xive.take() == 0


async def test_an_interrupt_that_the_old_irqchip_took_is_heard_by_the_new_one_if_the_line_is_high(
    place: Place,
) -> None:
    async with place.intx() as (_, server):
        server.raise_line()
        assert place.xics.take() == 1
        await place.controller.activate(place.xive)
        assert place.xive.take() == 1


async def test_a_line_that_went_low_is_not_heard_of_again(place: Place) -> None:
    async with place.intx() as (_, server):
        server.raise_line()
        server.high = False
        await place.controller.activate(place.xive)
        assert place.xive.take() == 0
        server.raise_line()
        assert place.xive.take() == 1


async def test_a_device_that_does_not_mask_itself_is_left_on_the_slow_path(place: Place) -> None:
    async with place.device(intx_flags=EDGES) as (session, _), open_intx(session, place.controller) as intx:
        await intx.enable()
        await place.controller.activate(place.xive)
        assert place.said() == ["TRIGGER", *TO_XIVE]
        assert (intx.accelerated, intx.failure, intx.counters.fallbacks) == (False, None, 0)


async def test_what_such_a_device_signalled_is_not_drained(place: Place) -> None:
    async with place.intx(intx_flags=EDGES) as (intx, server):
        server.raise_line()
        await place.controller.activate(place.xive)
        await settled()
        assert intx.pending
        assert place.xive.high == {INPUT}
        assert intx.counters.drained == 0


async def test_what_it_signalled_before_goes_to_the_new_irqchip_though_it_is_not_said_again(
    place: Place,
) -> None:
    async with place.intx(intx_flags=EDGES) as (intx, server):
        server.raise_line()
        await settled()
        assert intx.pending
        await place.controller.activate(place.xive)
        await settled()
        assert server.signals == 1
        assert intx.pending
        assert place.xive.high == {INPUT}
        assert intx.counters.drained == 0


@pytest.mark.parametrize("intx_flags", [AUTOMASKED, EDGES])
async def test_two_devices_on_one_line_are_both_heard(place: Place, intx_flags: int) -> None:
    async with (
        place.intx(bypass=False, intx_flags=intx_flags) as (one, first),
        place.intx(bypass=False, intx_flags=intx_flags) as (other, second),
    ):
        first.raise_line()
        second.raise_line()
        await settled()
        assert place.said() == ["xics level 5 1"]
        with client.Bar(one.session, 0) as bar:
            await bar.read(0, 4)
        await settled()
        assert (one.pending, other.pending) == (False, True)
        assert place.said() == ["read", "UNMASK"]
        assert place.xics.high == {5}
        await place.controller.activate(place.xive)
        await settled()
        assert place.xive.high == {5}
        assert not place.xics.high
        with client.Bar(other.session, 0) as bar:
            await bar.read(0, 4)
        await settled()
        assert not place.xive.high


async def test_two_devices_on_one_line_share_the_input_on_the_fast_path_and_on_both(place: Place) -> None:
    async with (
        open_pic() as pic,
        open_ioapic() as ioapic,
        place.device() as (session, first),
        place.device() as (another, second),
        place.device() as (third, slow),
    ):
        controller = InterruptController(pic, [IntxRoute(IntxMode.ENABLED, 10)])
        async with (
            open_intx(session, controller) as one,
            open_intx(another, controller, slot=4) as other,
            open_intx(third, controller, slot=8, bypass=False) as last,
            open_processor(controller) as cpu,
        ):
            found: list[Server] = []

            async def handle() -> bool:
                """As a driver does who asks each of its devices."""
                for line, server in ((one, first), (other, second), (last, slow)):
                    if server.high:
                        found.append(server)
                        await client.Bar(line.session, 0, map=False).read(ISR, 4)
                return True

            assert one.line == other.line == last.line == 0
            for each in (one, other, last):
                await each.enable()
            with cpu.handling(0, handle):
                for chip in (ioapic, pic, ioapic):
                    for server in (first, second, slow):
                        server.raise_line()
                    await controller.activate(chip)
                    await settled()
                    assert {first, second, slow} == set(found)
                    assert not any(server.masked or server.high for server in (first, second, slow))
                    found.clear()


async def test_only_so_many_dark_times_are_kept(place: Place) -> None:
    async with place.intx() as (intx, _):
        intx.dark.extend([1.0] * (DARK_KEPT + 1))
        assert len(intx.dark) == DARK_KEPT


async def test_the_time_in_the_dark_is_that_of_the_messages(
    place: Place, mock_clock: trio.testing.MockClock
) -> None:
    async with place.intx() as (intx, server), trio.open_nursery() as nursery:
        server.script = {0: Does.IGNORE}
        nursery.start_soon(place.controller.activate, place.xive)
        await settled()
        mock_clock.jump(0.25)
        server.wake()
        await settled()
        assert list(intx.dark) == [0.25]
        assert intx.accelerated


async def test_enabling_and_a_change_at_a_time_end_at_the_new_irqchip(place: Place) -> None:
    async with place.intx() as (intx, _):
        await intx.disable()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(intx.enable)
            nursery.start_soon(place.controller.activate, place.xive)
        assert intx.accelerated
        assert list(place.xive.attached) == [5]


async def test_an_irqchip_that_fails_in_its_own_way_does_not_leave_the_line_unheard(place: Place) -> None:
    async with place.intx() as (intx, server):

        def attach(gsi: int, trigger_fd: int, resample_fd: int) -> None:
            raise LookupError

        place.xive.attach = attach  # type: ignore[method-assign]
        with pytest.RaisesGroup(LookupError):
            await place.controller.activate(place.xive)
        assert place.said() == [*TO_XIVE, *APART, "MASK", "UNMASK"]
        server.raise_line()
        await settled()
        assert intx.pending


async def test_no_eventfd_left_means_the_slow_path(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place.intx() as (intx, _):

        def eventfd() -> int:
            raise OSError(24, "Too many open files")

        monkeypatch.setattr("client.irqchip._bypass.make_eventfd", eventfd)
        await place.controller.activate(place.xive)
        assert place.said() == [*TO_XIVE, *APART, "MASK", "UNMASK"]
        assert "Too many open files" in str(intx.failure)


async def test_a_line_whose_block_is_over_is_not_enabled_any_more(place: Place) -> None:
    async with place.device() as (session, server):
        async with open_intx(session, place.controller) as intx:
            pass
        with pytest.raises(RuntimeError, match="closed to new arrivals"):
            await intx.enable()
        assert (intx.enabled, intx.trigger_fd) == (False, -1)
        assert not server.masked
