"""Whatever fails on the way of a change: what is said after it, to whom, and that the line is heard again."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator

import pytest
import trio
import trio.testing

import client
from client.irqchip import Intx, IntxMode, IntxRoute, IrqchipError, open_intx
from protocol.limits import INTX_TIMEOUT, MAX_QUEUED
from tests.client.irqchip.scripted import INPUT, MAPPED, Does, Place, Server, nothing_left, settled

TO_XIVE = ["xics deactivate", "xive activate"]
APART = ["MASK", "xics detach 5", "UNMASK"]
CHANGE = [*TO_XIVE, *APART, "MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]
GIVEN_UP = ["xive detach 5", "UNMASK"]

STEPS = [("MASK", 0), ("UNMASK", 1), ("the second MASK", 2), ("UNMASK eventfd", 3), ("the last UNMASK", 4)]
"""The messages of a change."""


@pytest.fixture
def place() -> Iterator[Place]:
    with nothing_left() as made:
        yield made


def steps(*expected: list[str]) -> pytest.MarkDecorator:
    """For each message the journal of a change on which it fails."""
    cases = [
        pytest.param(step, TO_XIVE + after, id=name)
        for (name, step), after in zip(STEPS, expected, strict=True)
    ]
    return pytest.mark.parametrize(("step", "journal"), cases)


async def check_heard(place: Place, intx: Intx, server: Server) -> None:
    """The line can say something, and is heard by the irqchip in use."""
    place.said()
    server.high = False
    server.raise_line()
    await settled()
    if intx.accelerated:
        assert place.xive.take() == 1
    else:
        assert intx.pending
        assert place.xive.high == {INPUT}
        with client.Bar(intx.session, 0) as bar:
            await bar.read(0, 4)
        await settled()
        assert not intx.pending
        assert not server.high


REFUSED = [*APART, "MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]


@steps(
    REFUSED,
    REFUSED,
    [*APART, "MASK", "UNMASK"],
    [*APART, "MASK", "xive attach 5", "UNMASK|EVENTFD", *GIVEN_UP],
    [*REFUSED, *GIVEN_UP],
)
async def test_what_the_server_refuses_is_told_once_and_the_line_is_heard(
    place: Place, caplog: pytest.LogCaptureFixture, step: int, journal: list[str]
) -> None:
    async with place.intx() as (intx, server):
        server.script = {step: Does.REFUSE}
        with caplog.at_level(logging.WARNING):
            await place.controller.activate(place.xive)
        assert place.said() == journal
        assert len(caplog.records) == 1
        assert isinstance(intx.failure, client.ServerError)
        assert intx.failure.errno == errno.EIO
        assert intx.accelerated == (step < 2)
        assert intx.counters.fallbacks == (step >= 2)
        await check_heard(place, intx, server)
        await place.controller.activate(place.xics)
        assert intx.failure is None
        assert intx.accelerated, "the next change finds everything in order"


@steps(
    APART,
    APART,
    [*APART, "MASK", "UNMASK"],
    [*APART, "MASK", "xive attach 5", "UNMASK|EVENTFD", *GIVEN_UP],
    [*REFUSED, *GIVEN_UP],
)
async def test_a_silent_server_is_waited_for_so_long_and_finds_the_line_in_order_when_it_wakes_up(
    place: Place, autojump_clock: trio.testing.MockClock, step: int, journal: list[str]
) -> None:
    async with place.intx() as (intx, server):
        server.script = {step: Does.IGNORE}
        began = trio.current_time()
        await place.controller.activate(place.xive)
        assert trio.current_time() - began == INTX_TIMEOUT
        assert "does not answer" in str(intx.failure)
        assert not intx.accelerated
        assert intx.counters.fallbacks == 1
        server.wake()
        await settled()
        assert place.said() == journal
        await check_heard(place, intx, server)
        await place.controller.activate(place.xics)
        assert intx.accelerated


@steps(
    ["MASK", "xics detach 5"],
    APART,
    [*APART, "MASK"],
    [*APART, "MASK", "xive attach 5", "UNMASK|EVENTFD", "xive detach 5"],
    [*REFUSED, "xive detach 5"],
)
async def test_when_the_server_hangs_up_our_half_goes_on_and_another_session_finds_it_in_order(
    place: Place, step: int, journal: list[str]
) -> None:
    async with place.intx() as (intx, server):
        server.script = {step: Does.HANG_UP}
        await place.controller.activate(place.xive)
        assert place.said() == journal
        assert isinstance(intx.failure, client.Disconnected)
        assert intx.enabled
        assert not intx.accelerated
        assert not place.xics.attached
        assert not place.xive.attached
        async with place.device() as (session, another):
            await intx.reconnect(session)
            assert place.said() == ["TRIGGER", "MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]
            assert intx.accelerated
            assert intx.failure is None
            await check_heard(place, intx, another)
            await intx.disable()


@pytest.mark.parametrize(("name", "step"), STEPS)
async def test_a_cancellation_waits_for_the_end_of_the_change(place: Place, name: str, step: int) -> None:
    async with place.intx() as (intx, server), trio.open_nursery() as nursery:
        server.script = {step: Does.IGNORE}
        scope = trio.CancelScope()

        async def change() -> None:
            with scope:
                await place.controller.activate(place.xive)

        nursery.start_soon(change)
        await settled()
        scope.cancel()
        await settled()
        server.wake()
        await settled()
        assert place.said() == CHANGE
        assert intx.accelerated
        assert not server.masked, name


@pytest.mark.parametrize("step", range(4))
async def test_a_cancelled_enable_is_complete_before_it_is_taken_back(place: Place, step: int) -> None:
    async with place.device() as (session, server), trio.open_nursery() as nursery:
        server.script = {step: Does.IGNORE}
        scope = trio.CancelScope()

        async def use() -> None:
            with scope:
                async with open_intx(session, place.controller) as intx:
                    await intx.enable()
                    assert intx.accelerated
                    await trio.sleep_forever()

        nursery.start_soon(use)
        await settled()
        scope.cancel()
        await settled()
        assert len(place.controller.irqchip_change) == 1
        server.wake()
        await settled()
        assert len(place.controller.irqchip_change) == 0
        assert place.said()[-4:] == ["MASK", "xics detach 5", "UNMASK", "DISABLE"]


async def test_the_new_irqchip_refuses(place: Place) -> None:
    async with place.intx() as (intx, server):
        place.xive.refuses = {"attach"}
        await place.controller.activate(place.xive)
        assert place.said() == [*TO_XIVE, *APART, "MASK", "xive attach 5", "UNMASK"]
        assert "xive: attach" in str(intx.failure)
        assert intx.counters.fallbacks == 1
        await check_heard(place, intx, server)


async def test_the_first_irqchip_refuses(place: Place) -> None:
    place.xics.refuses = {"attach"}
    async with place.device() as (session, server), open_intx(session, place.controller) as intx:
        await intx.enable()
        assert place.said() == ["TRIGGER", "MASK", "xics attach 5", "UNMASK"]
        assert intx.enabled
        assert not intx.accelerated
        await place.controller.activate(place.xive)
        assert place.said() == [*TO_XIVE, "MASK", "xive attach 5", "UNMASK|EVENTFD", "UNMASK"]
        assert intx.accelerated
        await check_heard(place, intx, server)


async def test_an_irqchip_that_does_not_let_go_in_peace_is_left_all_the_same(place: Place) -> None:
    async with place.intx() as (intx, server):
        place.xics.refuses = {"detach"}
        await place.controller.activate(place.xive)
        assert place.said() == CHANGE
        assert "xics: detach" in str(intx.failure)
        await check_heard(place, intx, server)


@pytest.mark.parametrize("does", [Does.REFUSE, Does.IGNORE, Does.HANG_UP], ids=lambda does: does.value)
async def test_enabling_fails_with_the_first_message(
    place: Place, autojump_clock: trio.testing.MockClock, does: Does
) -> None:
    error = {
        Does.REFUSE: client.ServerError,
        Does.IGNORE: client.ClientError,
        Does.HANG_UP: client.Disconnected,
    }
    async with place.device() as (session, server), open_intx(session, place.controller) as intx:
        server.script = {0: does}
        with pytest.raises(error[does]):
            await intx.enable()
        assert (intx.enabled, intx.trigger_fd) == (False, -1)
        server.wake()
        await settled()
        assert place.said() == (["TRIGGER"] if does is Does.HANG_UP else ["TRIGGER", "DISABLE"])
        assert len(session.trapping) == 0
        if does is not Does.HANG_UP:
            await intx.enable()
            assert intx.accelerated


@pytest.mark.parametrize(
    ("step", "journal"),
    [
        (1, ["TRIGGER", "MASK", "UNMASK"]),
        (2, ["TRIGGER", "MASK", "xics attach 5", "UNMASK|EVENTFD", "xics detach 5", "UNMASK"]),
        (3, ["TRIGGER", "MASK", "xics attach 5", "UNMASK|EVENTFD", "UNMASK", "xics detach 5", "UNMASK"]),
    ],
)
async def test_enabling_succeeds_on_the_slow_path_when_a_later_one_is_refused(
    place: Place, step: int, journal: list[str]
) -> None:
    async with place.device() as (session, server), open_intx(session, place.controller) as intx:
        server.script = {step: Does.REFUSE}
        await intx.enable()
        assert place.said() == journal
        assert intx.enabled
        assert intx.counters.fallbacks == 1
        server.raise_line()
        await settled()
        assert intx.pending


@pytest.mark.parametrize("does", [Does.REFUSE, Does.IGNORE, Does.HANG_UP], ids=lambda does: does.value)
@pytest.mark.parametrize("step", range(3))
async def test_disabling_is_complete_on_this_side_whatever_the_server_does(
    place: Place, autojump_clock: trio.testing.MockClock, does: Does, step: int
) -> None:
    async with place.intx() as (intx, server):
        server.script = {step: does}
        began = trio.current_time()
        await intx.disable()
        assert trio.current_time() - began <= INTX_TIMEOUT
        assert not intx.enabled
        assert not place.xics.attached
        server.wake()
        await settled()
        said = ["MASK", "xics detach 5", "UNMASK", "DISABLE"]
        if does is Does.HANG_UP:
            said = said[: step + 2]
        assert place.said() == said


async def test_a_hung_server_does_not_hold_up_the_lines_of_others(
    place: Place, mock_clock: trio.testing.MockClock
) -> None:
    async with (
        place.intx() as (hung, server),
        place.device() as (session, other),
        open_intx(session, place.controller, slot=1) as intx,
        trio.open_nursery() as nursery,
    ):
        await place.controller.set_route(1, IntxRoute(IntxMode.ENABLED, 9))
        await intx.enable()
        server.script = {0: Does.IGNORE}
        nursery.start_soon(place.controller.activate, place.xive)
        await settled()
        assert place.xive.attached.keys() == {9}
        other.raise_line()
        assert place.xive.take(9) == 1
        mock_clock.jump(INTX_TIMEOUT)
        await settled()
        assert not hung.accelerated
        server.wake()


async def test_what_stops_the_program_amid_disabling_leaves_nothing_in_the_irqchip(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    async with place.intx() as (intx, _):
        with monkeypatch.context() as patch:
            patch.setattr(intx.session, "set_irqs", interrupted)
            with pytest.raises(KeyboardInterrupt):
                await intx.disable()
        assert (intx.enabled, intx.accelerated, intx.trigger_fd) == (False, False, -1)
        assert not place.xics.attached


async def test_an_irqchip_that_refuses_a_level_does_not_keep_the_line_from_being_disabled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gsi: int, level: bool) -> None:
        raise IrqchipError(f"input {gsi} to {level}", errno.EIO)

    async with place.intx(bypass=False) as (intx, server):
        server.raise_line()
        await settled()
        with monkeypatch.context() as patch:
            patch.setattr(place.xics, "set_level", broken)
            await intx.disable()
        assert "input 5 to False" in str(intx.failure)
        assert (intx.enabled, intx.trigger_fd) == (False, -1)
        assert len(intx.session.trapping) == 0
        place.xics.high.clear()


async def test_an_unmask_leaves_however_much_waits_for_a_server_that_wakes_up_too_late(
    place: Place, mock_clock: trio.testing.MockClock
) -> None:
    async with place.intx() as (intx, server), trio.open_nursery() as nursery:
        server.script = {0: Does.IGNORE}
        nursery.start_soon(place.controller.activate, place.xive)
        await settled()
        for _ in range(2 * MAX_QUEUED >> 12):
            intx.session.post_write_now(0, MAPPED, bytes(1 << 12))
        mock_clock.jump(INTX_TIMEOUT)
        await settled()
        assert not intx.accelerated
        server.wake()
        await settled()
        assert [said for said in place.said() if said != "write"] == [*TO_XIVE, *APART]
        assert not server.masked
        await check_heard(place, intx, server)
