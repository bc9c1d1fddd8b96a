"""The slow path: driven by its level, ended by an access to a BAR, which is not mapped meanwhile."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

import client
from client._eventfd import make_eventfd, signal, take
from client.irqchip import NOWHERE, Intx, IntxCounters, IntxMode, IntxRoute, open_intx
from client.irqchip._slow import SlowPath
from protocol.limits import INTX_MAPPINGS_OFF, INTX_TIMEOUT
from tests.client.irqchip.scripted import (
    AUTOMASKED,
    BAR0,
    CONFIG,
    EDGES,
    INPUT,
    ISR,
    MAPPED,
    Does,
    Place,
    nothing_left,
    settled,
)

EPSILON = 0.001


async def settled_soon(intx: Intx) -> None:
    """Until an interrupt that was signalled is pending; without the time going on."""
    while not intx.pending:
        await trio.lowlevel.checkpoint()


@pytest.fixture
def place() -> Iterator[Place]:
    with nothing_left() as made:
        yield made


async def test_an_interrupt_drives_the_line_until_the_next_access_to_a_bar(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        with client.Bar(intx.session, BAR0) as bar:
            await bar.read(ISR, 4)
            await settled()
            assert place.said() == ["read"], "nothing is pending, so nothing ends"
            server.raise_line()
            await settled()
            assert intx.pending
            assert place.said() == ["xics level 5 1"]
            await bar.read(ISR, 4)
            assert not intx.pending
            await settled()
            assert place.said() == ["read", "xics level 5 0", "UNMASK"]
            assert (intx.counters.triggers, intx.counters.ends) == (1, 1)
            assert not server.masked


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("access", ["read", "write", "post"])
async def test_any_access_to_a_bar_is_the_end_also_where_it_is_mapped(
    place: Place, access: str, mapped: bool
) -> None:
    async with place.intx(bypass=False) as (intx, server):
        with client.Bar(intx.session, BAR0, map=mapped) as bar:
            server.raise_line()
            await settled()
            server.high = False
            place.said()
            if access == "read":
                await bar.read(MAPPED, 4)
            elif access == "write":
                await bar.write(MAPPED, 4, 7)
            else:
                bar.post(MAPPED, 4, 7)
            await settled()
            assert set(place.said()) == {"read" if access == "read" else "write", "xics level 5 0", "UNMASK"}
            assert not intx.pending


async def test_configuration_space_and_other_accesses_are_no_end(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.raise_line()
        await settled()
        with client.Bar(intx.session, CONFIG) as config:
            assert await config.read(0x3D, 1) == 1
        await intx.session.region_read(BAR0, 8, 4)
        await settled()
        assert intx.pending
        await intx.disable()


async def test_a_refused_access_is_no_end(place: Place) -> None:
    async with place.device() as (session, server):
        told: list[int] = []
        with session.trapping.subscribed(lambda _: told.append(1)), client.Bar(session, BAR0) as bar:
            server.refuses_accesses = True
            with pytest.raises(client.ServerError):
                await bar.read(ISR, 4)
            with pytest.raises(client.ServerError):
                await bar.write(ISR, 4, 0)
            assert not told


async def test_a_line_that_is_still_high_interrupts_again(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        with client.Bar(intx.session, BAR0) as bar:
            server.raise_line()
            await settled()
            await bar.write(8, 4, 0)  # another register: the reason stands
            await settled()
            assert place.said() == ["xics level 5 1", "write", "xics level 5 0", "UNMASK", "xics level 5 1"]
            assert server.signals == intx.counters.triggers == 2
            await bar.read(ISR, 4)
        await settled()
        assert not intx.pending


async def test_mappings_are_off_from_the_interrupt_until_it_has_been_quiet_for_so_long(
    place: Place, mock_clock: trio.testing.MockClock
) -> None:
    async with place.intx(bypass=False) as (intx, server):
        trapping = intx.session.trapping
        with client.Bar(intx.session, BAR0) as bar:
            assert bar.mapping is not None
            bar.mapping.write(MAPPED, 4, 0x1234)
            place.said()
            assert await bar.read(MAPPED, 4) == 0x1234
            assert place.said() == []
            server.raise_line()
            await settled()
            assert not trapping.mapped
            mock_clock.jump(INTX_MAPPINGS_OFF + EPSILON)
            await settled()
            assert not trapping.mapped, "it is still pending"
            await bar.read(ISR, 4)
            await settled()
            assert not trapping.mapped, "and was a moment ago"
            mock_clock.jump(INTX_MAPPINGS_OFF - EPSILON)
            await settled()
            assert not trapping.mapped
            mock_clock.jump(EPSILON)
            await settled()
            assert trapping.mapped
            place.said()
            assert await bar.read(MAPPED, 4) == 0x1234
            assert place.said() == []


async def test_a_device_that_interrupts_often_keeps_them_off(
    place: Place, mock_clock: trio.testing.MockClock
) -> None:
    async with place.intx(bypass=False) as (intx, server):
        with client.Bar(intx.session, BAR0) as bar:
            for _ in range(5):
                server.raise_line()
                await settled()
                await bar.read(ISR, 4)
                await settled()
                mock_clock.jump(INTX_MAPPINGS_OFF - EPSILON)
                await settled()
                assert not intx.session.trapping.mapped
            mock_clock.jump(EPSILON)
            await settled()
            assert intx.session.trapping.mapped


async def test_an_irqchip_without_resample_works_so(place: Place, mock_clock: trio.testing.MockClock) -> None:
    place.xive.resample = False
    async with place.intx() as (intx, server):
        await place.controller.activate(place.xive)
        with client.Bar(intx.session, BAR0) as bar:
            for _ in range(3):
                server.raise_line()
                await settled()
                assert place.xive.high == {INPUT}
                assert not intx.session.trapping.mapped
                await bar.read(ISR, 4)
                await settled()
                assert not place.xive.high
        mock_clock.jump(INTX_MAPPINGS_OFF)
        await settled()
        assert intx.session.trapping.mapped
        place.xive.resample = True
        await place.controller.activate(place.xics)
        await place.controller.activate(place.xive)
        assert intx.accelerated


async def test_the_fast_path_leaves_mappings_alone_and_gives_them_back_after_the_slow_one(
    place: Place, mock_clock: trio.testing.MockClock
) -> None:
    async with place.intx() as (intx, server):
        server.raise_line()
        await settled()
        assert intx.session.trapping.mapped
        await place.controller.set_route(0, NOWHERE)
        await settled()
        assert intx.pending
        assert not intx.session.trapping.mapped
        await place.controller.set_route(0, IntxRoute(IntxMode.ENABLED, 6))
        assert intx.accelerated
        assert not intx.pending
        assert not place.xics.high
        mock_clock.jump(INTX_MAPPINGS_OFF)
        await settled()
        assert intx.session.trapping.mapped


async def test_disabling_gives_the_mappings_back_at_once(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.raise_line()
        await settled()
        assert not intx.session.trapping.mapped
        await intx.disable()
        assert intx.session.trapping.mapped
        assert not intx.pending
        assert len(intx.session.trapping) == 0
        assert not place.xics.high


async def test_what_is_pending_goes_to_the_new_irqchip_and_its_end_is_not_missed(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.raise_line()
        await settled()
        place.said()
        await place.controller.activate(place.xive)
        await settled()
        assert place.said() == [
            "xics level 5 0",
            "xics deactivate",
            "xive activate",
            "xive level 5 1",
            "xive level 5 0",
            "UNMASK",
            "xive level 5 1",
        ]
        assert intx.counters.ends == 1
        assert intx.pending, "the line is still high"


async def test_what_is_pending_stays_so_while_the_line_goes_nowhere(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.raise_line()
        await settled()
        place.said()
        await place.controller.set_route(0, NOWHERE)
        assert place.said() == ["xics level 5 0"]
        assert intx.pending
        await place.controller.set_route(0, IntxRoute(IntxMode.INVERTED, 6))
        assert place.said() == []
        with client.Bar(intx.session, BAR0) as bar:
            await bar.read(ISR, 4)
        await settled()
        assert place.said() == ["read", "xics level 6 1", "UNMASK"]
        await place.controller.set_route(0, NOWHERE)


async def test_a_change_waits_for_the_end_that_is_being_said(place: Place) -> None:
    async with place.intx() as (intx, server), trio.open_nursery() as nursery:
        await place.controller.set_route(0, NOWHERE)
        server.raise_line()
        await settled()
        place.said()
        server.script = {0: Does.IGNORE}
        with client.Bar(intx.session, BAR0) as bar:
            bar.post(ISR, 4, 0)
        await settled()
        nursery.start_soon(place.controller.set_route, 0, IntxRoute(IntxMode.ENABLED, 5))
        await settled()
        assert place.said() == ["write", "UNMASK"]
        server.wake()
        await settled()
        assert place.said() == ["MASK", "xics attach 5", "UNMASK|EVENTFD", "UNMASK"]


async def test_an_end_between_the_messages_of_a_change_is_said_with_its_last(place: Place) -> None:
    async with place.intx() as (intx, server), trio.open_nursery() as nursery:
        await place.controller.set_route(0, NOWHERE)
        server.raise_line()
        await settled()
        place.said()
        server.script = {0: Does.IGNORE}
        nursery.start_soon(place.controller.set_route, 0, IntxRoute(IntxMode.ENABLED, 5))
        await settled()
        assert place.said() == ["xics level 5 1", "MASK"]
        with client.Bar(intx.session, BAR0) as bar:
            bar.post(8, 4, 0)
        assert not intx.pending
        await settled()
        server.wake()
        await settled()
        said = place.said()
        said.remove("write")
        assert said == ["xics level 5 0", "xics attach 5", "UNMASK|EVENTFD", "UNMASK"]
        assert intx.counters.ends == 0
        assert place.xics.take() == 1


@pytest.mark.parametrize("intx_flags", [AUTOMASKED, EDGES])
async def test_an_access_that_began_before_the_interrupt_was_heard_is_not_its_end(
    place: Place, intx_flags: int
) -> None:
    async with (
        place.intx(bypass=False, intx_flags=intx_flags) as (intx, server),
        trio.open_nursery() as nursery,
    ):
        bar = client.Bar(intx.session, BAR0, map=False)
        server.lets_access = trio.Event()
        nursery.start_soon(bar.read, ISR, 4)
        await settled()
        server.raise_line()  # the reason is younger than what the read saw
        await settled()
        server.lets_access.set()
        await settled()
        assert intx.pending
        assert place.xics.high == {INPUT}
        await bar.read(ISR, 4)
        assert not intx.pending


async def test_a_second_edge_of_a_device_that_does_not_mask_itself_is_not_ended_with_the_first(
    place: Place,
) -> None:
    async with place.intx(bypass=False, intx_flags=EDGES) as (intx, server), trio.open_nursery() as nursery:
        bar = client.Bar(intx.session, BAR0, map=False)
        server.raise_line()
        await settled()
        server.lets_access = trio.Event()
        nursery.start_soon(bar.read, ISR, 4)
        await settled()
        server.raise_line()
        await settled()
        server.lets_access.set()
        await settled()
        assert intx.pending
        await bar.read(ISR, 4)
        assert not intx.pending
        assert (intx.counters.triggers, intx.counters.merged) == (2, 1)


async def test_an_end_that_the_server_refuses_is_told_once(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.script = dict.fromkeys(range(3), Does.REFUSE)
        with client.Bar(intx.session, BAR0) as bar:
            for _ in range(3):
                server.masked = False
                server.raise_line()
                await settled()
                await bar.read(ISR, 4)
                await settled()
        assert len(caplog.records) == 1
        assert isinstance(intx.failure, client.ServerError)
        assert intx.failure.errno == errno.EIO


async def test_an_end_that_is_not_answered_holds_up_a_change_for_so_long_only(
    place: Place, autojump_clock: trio.testing.MockClock
) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.raise_line()
        await settled()
        server.script = {0: Does.IGNORE}
        with client.Bar(intx.session, BAR0) as bar:
            await bar.read(ISR, 4)
        began = trio.current_time()
        await place.controller.activate(place.xive)
        assert trio.current_time() - began <= INTX_TIMEOUT
        server.wake()


async def test_whoever_is_deafened_leaves_alone_even_what_woke_him_up(place: Place) -> None:
    class Deafening(trio.abc.Instrument):
        """Somebody else's turn comes first."""

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            if task.name.endswith("_hear"):
                slow.deafen()

    async with trio.open_nursery() as nursery:

        async def unmask() -> None:
            raise AssertionError

        slow = SlowPath(nursery, IntxCounters(), lambda level: None, unmask)
        fd = make_eventfd()
        slow.listen(fd)
        await settled()
        instrument = Deafening()
        trio.lowlevel.add_instrument(instrument)
        signal(fd)
        await settled()
        trio.lowlevel.remove_instrument(instrument)
        assert not slow.pending
        assert take(fd) == 1
        os.close(fd)


async def test_a_server_that_makes_its_eventfd_block_does_not_stop_us(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        os.set_blocking(intx.trigger_fd, True)
        server.raise_line()
        await settled()
        assert intx.pending
        await place.controller.activate(place.xive)
        await intx.disable()


async def test_ends_that_cannot_be_said_do_not_pile_up(
    place: Place, autojump_clock: trio.testing.MockClock
) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.script = {0: Does.IGNORE}
        with client.Bar(intx.session, BAR0) as bar:
            for _ in range(100):  # a server that does not wait for UNMASK, nor answer it
                signal(intx.trigger_fd)
                await settled_soon(intx)
                bar.post(ISR, 4, 0)
            assert intx._slow._nursery.child_tasks
            ends = [task for task in intx._slow._nursery.child_tasks if "_unmask_owed" in task.name]
            assert len(ends) <= 2, "one that is being said, and one for all since"
        server.wake()
        await settled()
        assert intx.counters.triggers == 100
        assert intx.counters.ends == 2


async def test_a_session_has_one_line_in_use(place: Place) -> None:
    async with (
        place.device() as (session, server),
        open_intx(session, place.controller) as first,
        open_intx(session, place.controller) as second,
    ):
        await first.enable()
        place.said()
        with pytest.raises(client.ClientError, match="another line of this session"):
            await second.enable()
        assert place.said() == []
        await first.disable()
        await second.enable()
        with pytest.raises(client.ClientError, match="another line of this session"):
            await first.enable()
        await second.reconnect(session)
        server.raise_line()
        assert place.xics.take() == 1


@pytest.mark.parametrize("flags", [AUTOMASKED, EDGES])
async def test_a_server_that_is_gone_leaves_no_interrupt_that_nobody_can_end(
    place: Place, flags: int
) -> None:
    async with place.intx(bypass=False, intx_flags=flags) as (intx, server):
        server.raise_line()
        await settled()
        assert place.xics.high == {INPUT}
        server.peer.sock.close()
        await settled()
        assert not place.xics.high
        await place.controller.activate(place.xive)
        signal(intx.trigger_fd)
        await settled()
        assert not place.xive.high
        async with place.device(intx_flags=flags) as (session, another):
            await intx.reconnect(session)
            if flags == AUTOMASKED:
                another.raise_line()
            await settled()
            assert place.xive.high == {INPUT}
            with client.Bar(session, BAR0) as bar:
                await bar.read(ISR, 4)
            assert not place.xive.high
            await intx.disable()
