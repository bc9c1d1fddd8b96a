"""Another session to the same device: what the server has lost is wired again, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
import trio.testing

import client
from client.irqchip import open_intx
from protocol.limits import INTX_TIMEOUT
from tests.client.irqchip.scripted import BAR0, EDGES, ISR, MAPPED, Does, Place, nothing_left, settled

LIVE = ["TRIGGER", "MASK", "xics attach 5", "UNMASK|EVENTFD", "UNMASK"]


@pytest.fixture
def place() -> Iterator[Place]:
    with nothing_left() as made:
        yield made


async def test_the_wiring_is_replayed_and_the_line_is_live(place: Place) -> None:
    async with place.intx() as (intx, server), place.device() as (session, another):
        server.peer.sock.close()
        await intx.reconnect(session)
        assert place.said() == ["xics detach 5", *LIVE]
        assert intx.session is session
        assert intx.accelerated
        another.raise_line()
        assert place.xics.take() == 1
        place.xics.end()
        await intx.disable()


async def test_a_server_that_is_still_there_is_told_to_let_go(place: Place) -> None:
    async with place.intx() as (intx, server), place.device() as (session, _):
        await intx.reconnect(session)
        assert place.said() == ["xics detach 5", "DISABLE", *LIVE]
        server.raise_line()
        assert server.signals == 0
        await intx.disable()


async def test_the_same_session_can_be_wired_again(place: Place) -> None:
    async with place.intx() as (intx, _):
        await intx.reconnect(intx.session)
        assert place.said() == ["xics detach 5", "DISABLE", *LIVE]


async def test_one_that_does_not_mask_itself_is_at_no_time_without_its_eventfd(place: Place) -> None:
    async with place.intx(intx_flags=EDGES) as (intx, _):
        await intx.reconnect(intx.session)
        assert place.said() == ["TRIGGER"]


async def test_what_is_pending_there_is_not_forgotten(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server):
        server.raise_line()
        await settled()
        await intx.reconnect(intx.session)
        await settled()
        assert intx.pending
        with client.Bar(intx.session, BAR0) as bar:
            await bar.read(ISR, 4)
        await settled()
        assert not server.masked


@pytest.mark.parametrize("bypass", [True, False])
async def test_a_line_that_is_high_at_the_new_server_is_heard_once(place: Place, bypass: bool) -> None:
    async with place.intx(bypass=bypass) as (intx, server), place.device() as (session, another):
        server.raise_line()
        server.peer.sock.close()
        another.raise_line()
        await intx.reconnect(session)
        await settled()
        if bypass:
            assert place.xics.take() == 1
        else:
            assert intx.pending
            assert intx.counters.triggers <= 2
        with client.Bar(session, BAR0) as bar:
            await bar.read(ISR, 4)
        await settled()
        assert not intx.pending
        await intx.disable()


async def test_an_interrupt_of_the_old_server_alone_is_forgotten(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, server), place.device() as (session, _):
        server.raise_line()
        await settled()
        assert not intx.session.trapping.mapped
        old = intx.session.trapping
        server.peer.sock.close()
        await intx.reconnect(session)
        await settled()
        assert not intx.pending
        assert old.mapped
        assert len(old) == 0
        assert session.trapping.mapped
        await intx.disable()


async def test_one_of_a_device_that_does_not_mask_itself_is_kept(place: Place) -> None:
    async with (
        place.intx(intx_flags=EDGES) as (intx, server),
        place.device(intx_flags=EDGES) as (session, _),
    ):
        server.raise_line()
        await settled()
        assert intx.pending
        await intx.reconnect(session)
        await settled()
        assert intx.pending
        await intx.disable()


async def test_accesses_count_at_the_new_session(place: Place) -> None:
    async with place.intx(bypass=False) as (intx, _), place.device() as (session, another):
        before = intx.session
        await intx.reconnect(session)
        another.raise_line()
        await settled()
        with client.Bar(before, BAR0) as bar:
            await bar.read(MAPPED, 4)
            await bar.read(ISR, 4)
        assert intx.pending
        with client.Bar(session, BAR0) as bar:
            await bar.read(MAPPED, 4)
        assert not intx.pending
        await intx.disable()


async def test_a_change_while_nobody_is_there_is_made_up_for(place: Place) -> None:
    async with place.intx() as (intx, server):
        server.peer.sock.close()
        await settled()
        await place.controller.activate(place.xive)
        assert place.said() == ["xics deactivate", "xive activate", "xics detach 5"]
        assert isinstance(intx.failure, client.Disconnected)
        async with place.device() as (session, _):
            await intx.reconnect(session)
            assert place.said() == ["TRIGGER", "MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]
            assert intx.failure is None
            await intx.disable()


@pytest.mark.parametrize("step", range(4))
async def test_a_change_during_a_reconnect_follows_it(place: Place, step: int) -> None:
    async with place.intx() as (intx, server), place.device() as (session, another):
        async with trio.open_nursery() as nursery:
            server.peer.sock.close()
            await settled()
            another.script = {step: Does.IGNORE}
            nursery.start_soon(intx.reconnect, session)
            await settled()
            nursery.start_soon(place.controller.activate, place.xive)
            await settled()
            another.wake()
        said = [each for each in place.said() if "activate" not in each]
        together = ["MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]
        first = {
            0: ["TRIGGER", *together, "MASK", "xive detach 5", "UNMASK"],
            1: ["TRIGGER", "MASK", "UNMASK"],  # by then nobody may attach to xics any more
            2: [*LIVE, "MASK", "xics detach 5", "UNMASK"],
            3: [*LIVE, "MASK", "xics detach 5", "UNMASK"],
        }
        assert said == ["xics detach 5", *first[step], *together]
        assert intx.accelerated
        another.raise_line()
        assert place.xive.take() == 1
        await intx.disable()


async def test_a_reconnect_that_was_overtaken_and_fails_as_well_is_made_up_for(place: Place) -> None:
    async with place.intx() as (intx, server), place.device() as (session, another):
        async with trio.open_nursery() as nursery:
            server.peer.sock.close()
            await settled()
            another.script = {1: Does.IGNORE, 2: Does.REFUSE}
            nursery.start_soon(intx.reconnect, session)
            await settled()
            nursery.start_soon(place.controller.activate, place.xive)
            await settled()
            another.wake()
        assert place.said()[-5:] == ["UNMASK", "MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]
        assert intx.accelerated
        another.raise_line()
        assert place.xive.take() == 1
        await intx.disable()


async def test_a_line_that_is_not_enabled_only_changes_its_session(place: Place) -> None:
    async with place.intx() as (intx, _), place.device() as (session, _):
        await intx.disable()
        place.said()
        await intx.reconnect(session)
        assert place.said() == []
        await intx.enable()
        assert place.said() == LIVE
        await intx.disable()


@pytest.mark.parametrize("does", [Does.REFUSE, Does.IGNORE, Does.HANG_UP], ids=lambda does: does.value)
async def test_a_reconnect_that_fails_may_be_tried_again(
    place: Place, autojump_clock: trio.testing.MockClock, does: Does
) -> None:
    async with place.intx() as (intx, server), place.device() as (session, another):
        server.peer.sock.close()
        another.script = {0: does}
        with pytest.raises(client.ClientError):
            await intx.reconnect(session)
        assert intx.enabled
        assert not intx.accelerated
        assert intx.failure is not None
        another.wake()
        async with place.device() as (third, device):
            place.said()
            await intx.reconnect(third)
            assert [each for each in place.said() if each != "DISABLE"] == LIVE
            device.raise_line()
            assert place.xics.take() == 1
            await intx.disable()


async def test_a_device_that_cannot_have_the_line_changes_nothing(place: Place) -> None:
    capabilities = b'{"capabilities":{"max_msg_fds":0}}\0'
    async with place.intx() as (intx, server), place.device(capabilities=capabilities) as (session, _):
        before = intx.session
        with pytest.raises(client.ClientError, match="takes no descriptors"):
            await intx.reconnect(session)
        assert place.said() == []
        assert intx.session is before
        assert intx.accelerated
        server.raise_line()
        assert place.xics.take() == 1


async def test_a_silent_old_server_delays_the_new_one_for_so_long_only(
    place: Place, autojump_clock: trio.testing.MockClock
) -> None:
    async with place.intx() as (intx, server), place.device() as (session, _):
        server.script = {0: Does.IGNORE}
        began = trio.current_time()
        await intx.reconnect(session)
        assert trio.current_time() - began == INTX_TIMEOUT
        assert intx.accelerated
        server.wake()
        await settled()
        await intx.disable()


async def test_a_cancelled_reconnect_is_complete_first(place: Place) -> None:
    async with place.intx() as (intx, _), place.device() as (session, another):
        async with trio.open_nursery() as nursery:
            another.script = {1: Does.IGNORE}
            scope = trio.CancelScope()

            async def reconnect() -> None:
                with scope:
                    await intx.reconnect(session)

            nursery.start_soon(reconnect)
            await settled()
            scope.cancel()
            await settled()
            another.wake()
        assert place.said() == ["xics detach 5", "DISABLE", *LIVE]
        assert intx.accelerated
        await intx.disable()


async def test_opening_without_enabling_leaves_nothing(place: Place) -> None:
    async with place.device() as (session, _), open_intx(session, place.controller):
        pass
    assert place.said() == []
