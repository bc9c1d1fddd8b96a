from __future__ import annotations

import pytest
import trio
import trio.testing

from client.irqchip import Notifier


async def test_everybody_is_told_at_a_time() -> None:
    notifier = Notifier("change")
    told: list[str] = []
    go_on = trio.Event()

    async def slow() -> None:
        await go_on.wait()
        told.append("slow")

    async def quick() -> None:
        told.append("quick")
        go_on.set()

    with notifier.subscribed(slow), notifier.subscribed(quick):
        assert len(notifier) == 2
        await notifier.notify()
    assert told == ["quick", "slow"]
    assert len(notifier) == 0
    await notifier.notify()
    assert len(told) == 2


async def test_a_subscription_ends_with_its_block_whatever_ends_that() -> None:
    notifier = Notifier("change")

    async def subscriber() -> None:
        raise AssertionError

    def fail() -> None:
        with notifier.subscribed(subscriber):
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert len(notifier) == 0


async def test_the_same_subscriber_may_come_twice_and_go_once() -> None:
    notifier = Notifier("change")
    told: list[int] = []

    async def subscriber() -> None:
        told.append(1)

    with notifier.subscribed(subscriber):
        with notifier.subscribed(subscriber):
            await notifier.notify()
        assert len(told) == 2
        await notifier.notify()
        assert len(told) == 3


async def test_one_who_fails_keeps_it_from_nobody() -> None:
    notifier = Notifier("change of weather")
    told: list[str] = []

    async def fails() -> None:
        raise LookupError("no umbrella")

    async def hears() -> None:
        await trio.testing.wait_all_tasks_blocked()
        told.append("heard")

    with (
        notifier.subscribed(fails),
        notifier.subscribed(hears),
        notifier.subscribed(fails),
        pytest.RaisesGroup(LookupError, LookupError, match="change of weather: not everybody"),
    ):
        await notifier.notify()
    assert told == ["heard"]


async def test_even_an_interrupt_from_the_keyboard_keeps_it_from_nobody() -> None:
    notifier = Notifier("change")
    told: list[str] = []

    async def interrupted() -> None:
        raise KeyboardInterrupt

    async def hears() -> None:
        await trio.testing.wait_all_tasks_blocked()
        told.append("heard")

    with (
        notifier.subscribed(interrupted),
        notifier.subscribed(hears),
        pytest.RaisesGroup(KeyboardInterrupt, match="change: not everybody"),
    ):
        await notifier.notify()
    assert told == ["heard"]


async def test_a_cancellation_waits_until_everybody_has_been_told() -> None:
    notifier = Notifier("change")
    told: list[str] = []

    async def hears() -> None:
        await trio.lowlevel.checkpoint()
        told.append("heard")

    with notifier.subscribed(hears), trio.CancelScope() as scope:
        scope.cancel()
        await notifier.notify()
    assert told == ["heard"]


async def test_whoever_subscribes_meanwhile_hears_of_the_next_change() -> None:
    notifier = Notifier("change")
    told: list[str] = []
    go_on = trio.Event()

    async def first() -> None:
        await go_on.wait()

    async def second() -> None:
        told.append("second")

    async with trio.open_nursery() as nursery:
        with notifier.subscribed(first):
            nursery.start_soon(notifier.notify)
            await trio.testing.wait_all_tasks_blocked()
            with notifier.subscribed(second):
                go_on.set()
                await trio.testing.wait_all_tasks_blocked()
                assert told == []
                await notifier.notify()
                assert told == ["second"]


async def test_a_subscriber_at_work_and_its_tasks_are_known_until_all_have_finished() -> None:
    notifier, other = Notifier("change"), Notifier("other change")
    seen: list[tuple[bool, bool]] = []
    over = trio.Event()

    async def look() -> None:
        seen.append((notifier.telling_caller, other.telling_caller))

    async with trio.open_nursery() as nursery:

        async def outlives() -> None:
            await look()
            await over.wait()
            await look()

        async def subscriber() -> None:
            await look()
            nursery.start_soon(outlives)
            await trio.testing.wait_all_tasks_blocked()

        with notifier.subscribed(subscriber):
            await notifier.notify()
        await look()
        over.set()
    assert seen == [(True, False), (True, False), (False, False), (False, False)]
