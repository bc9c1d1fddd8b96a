from __future__ import annotations

import trio
import trio.testing

from client.virtio._signal import Signal


async def test_a_set_before_the_wait_is_remembered_once() -> None:
    signal = Signal()
    signal.set()
    signal.set()
    await signal.wait()
    with trio.move_on_after(0) as scope:
        await signal.wait()
    assert scope.cancelled_caught


async def test_a_set_wakes_everyone() -> None:
    signal = Signal()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(signal.wait)
        await trio.testing.wait_all_tasks_blocked()
        signal.set()


async def test_a_set_can_be_forgotten() -> None:
    signal = Signal()
    signal.set()
    signal.clear()
    with trio.move_on_after(0) as scope:
        await signal.wait()
    assert scope.cancelled_caught
