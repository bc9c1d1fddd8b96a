"""Work that is not left half done by whoever gives up waiting for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from errno import ENODEV
from typing import TypeVar

import outcome
import trio

from client.container.errors import ContainerError
from protocol.limits import UNMAP_TIMEOUT

T = TypeVar("T")


async def carry_through(
    nursery: trio.Nursery, work: Callable[[], Awaitable[T]], *, revocable: bool = False
) -> T:
    """Await `work` in a task of `nursery`; what it raises is raised here. It goes on when the caller is
    cancelled, unless it is `revocable`: then it is cancelled too, and gets UNMAP_TIMEOUT seconds to undo what
    it did before the caller goes on, and as long as it likes after that. If it is done by then, the caller
    has its result, and is cancelled when it waits next. Raises ContainerError(ENODEV) if the nursery ends.
    """
    done = trio.Event()
    scope = trio.CancelScope()
    result: outcome.Outcome[T] | None = None

    async def run() -> None:
        nonlocal result
        try:
            with scope:
                result = outcome.Value(await work())
        except Exception as error:
            result = outcome.Error(error)
        finally:
            done.set()

    nursery.start_soon(run)
    try:
        await done.wait()
    except trio.Cancelled:
        if revocable:
            scope.cancel()
            with trio.move_on_after(UNMAP_TIMEOUT, shield=True):
                await done.wait()
        if not (revocable and isinstance(result, outcome.Value)):
            raise
    if result is None:
        raise ContainerError(ENODEV, "the container is closed")
    return result.unwrap()
