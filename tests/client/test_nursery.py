from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from client._nursery import background


async def test_the_background_ends_with_the_block() -> None:
    ended = trio.Event()

    async def task() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with background() as nursery:
        nursery.start_soon(task)
        await trio.testing.wait_all_tasks_blocked()
    assert ended.is_set()


async def in_the_background(task: Callable[[], Awaitable[None]], error: Exception | None = None) -> None:
    """A block with a task that raises `error`, or waits."""
    async with background() as nursery:
        nursery.start_soon(task)
        if error is not None:
            raise error
        await trio.sleep_forever()


async def test_an_exception_of_the_block_comes_out_as_itself() -> None:
    with pytest.raises(KeyError, match="mine"):
        await in_the_background(trio.sleep_forever, KeyError("mine"))


async def test_an_exception_of_a_task_comes_out_as_itself() -> None:
    async def fail() -> None:
        raise KeyError("its")

    with pytest.raises(KeyError, match="its"):
        await in_the_background(fail)


async def test_several_exceptions_stay_a_group() -> None:
    async def fail() -> None:
        raise KeyError("its")

    with pytest.RaisesGroup(KeyError, ValueError):
        async with background() as nursery:
            nursery.start_soon(fail)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("mine")


async def test_a_timeout_around_it_works() -> None:
    with trio.move_on_after(0) as scope:
        await in_the_background(trio.sleep_forever)
    assert scope.cancelled_caught


async def test_a_group_of_the_block_is_not_opened() -> None:
    with pytest.RaisesGroup(KeyError):
        await in_the_background(trio.sleep_forever, ExceptionGroup("mine", [KeyError()]))
