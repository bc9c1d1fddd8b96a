from __future__ import annotations

from errno import ENODEV

import pytest
import trio
import trio.testing

from client.container import ContainerError
from client.container._jobs import Jobs
from protocol.limits import UNMAP_TIMEOUT


async def test_work_gives_its_result_or_its_error() -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery)

        async def fails() -> None:
            raise KeyError("it")

        async def works() -> int:
            await trio.lowlevel.checkpoint()
            return 5

        assert await jobs.carry_through(works) == 5
        with pytest.raises(KeyError, match="it"):
            await jobs.carry_through(fails)


@pytest.mark.parametrize("revocable", [True, False])
async def test_what_is_done_by_the_time_it_is_given_up_is_the_callers_if_it_would_have_been_undone(
    revocable: bool,
) -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery)
        results: list[int] = []
        with trio.CancelScope() as scope:

            async def work() -> int:
                scope.cancel()
                return 5

            results.append(await jobs.carry_through(work, revocable=revocable))
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert results == ([5] if revocable else [])


async def test_work_goes_on_without_its_caller_and_in_a_nursery_that_is_cancelled() -> None:
    done = trio.Event()
    go_on = trio.Event()

    async def work() -> None:
        await go_on.wait()
        done.set()

    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery)
        nursery.start_soon(jobs.carry_through, work)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
            go_on.set()
    assert done.is_set()


async def test_revocable_work_is_cancelled_with_its_caller_who_waits_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    undone = trio.Event()

    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery)

        async def work() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with jobs.shielded():
                    await trio.sleep(3 * UNMAP_TIMEOUT)
                    undone.set()

        start = trio.current_time()
        with trio.move_on_after(1):
            await jobs.carry_through(work, revocable=True)
        assert trio.current_time() - start == pytest.approx(1 + UNMAP_TIMEOUT)
        await undone.wait()
        assert trio.current_time() - start == pytest.approx(1 + 3 * UNMAP_TIMEOUT)


async def test_everything_ends_when_it_is_given_up() -> None:
    async with trio.open_nursery() as nursery:
        jobs = Jobs(nursery)
        refusals: list[int] = []

        async def undo() -> None:
            with jobs.shielded():
                await trio.sleep_forever()

        async def call() -> None:
            with pytest.raises(ContainerError) as caught:
                await jobs.carry_through(trio.sleep_forever)
            refusals.append(caught.value.errno)

        jobs.start(undo)
        nursery.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        jobs.give_up()
        nursery.start_soon(call)  # what comes later ends at once
    assert refusals == [ENODEV, ENODEV]
