"""Work that is not left half done by whoever gives up waiting for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from errno import ENODEV
from typing import TypeVar

import outcome
import trio

from client.container.errors import ContainerError
from protocol.limits import UNMAP_TIMEOUT

T = TypeVar("T")


class Jobs:
    """Runs in tasks of `nursery`, which may be cancelled: only `give_up` ends what goes on."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._shields: set[trio.CancelScope] = set()
        self._over = False

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """What is done here is cancelled by `give_up` alone."""
        with self._within(trio.CancelScope(shield=True)):
            yield

    @contextmanager
    def _within(self, scope: trio.CancelScope) -> Iterator[None]:
        if self._over:
            scope.cancel()
        self._shields.add(scope)
        try:
            with scope:
                yield
        finally:
            self._shields.remove(scope)

    def start(self, work: Callable[[], Awaitable[object]]) -> None:
        """Nobody waits for it; what it raises is a mistake."""

        async def run() -> None:
            with self.shielded():
                await work()

        self._nursery.start_soon(run)

    async def carry_through(self, work: Callable[[], Awaitable[T]], *, revocable: bool = False) -> T:
        """Await `work`; what it raises is raised here. It goes on when the caller is cancelled, unless it is
        `revocable`: then it is cancelled too, and gets UNMAP_TIMEOUT seconds to undo what it did before the
        caller goes on, and as long as it likes after that. If it is done by then, the caller has its result,
        and is cancelled when it waits next. Raises ContainerError(ENODEV) after `give_up`.
        """
        if self._over:
            raise ContainerError(ENODEV, "the container is closed")
        done = trio.Event()
        under_way = trio.CancelScope(shield=True)
        result: outcome.Outcome[T] | None = None

        async def run() -> None:
            nonlocal result
            with self._within(under_way):
                try:
                    result = outcome.Value(await work())
                except Exception as error:
                    result = outcome.Error(error)
            done.set()

        self._nursery.start_soon(run)
        try:
            await done.wait()
        except trio.Cancelled:
            if revocable:
                under_way.cancel()
                with trio.move_on_after(UNMAP_TIMEOUT, shield=True):
                    await done.wait()
            if not (revocable and isinstance(result, outcome.Value)):
                raise
        if result is None:
            raise ContainerError(ENODEV, "the container is closed")
        return result.unwrap()

    def give_up(self) -> None:
        """Nothing more is waited for."""
        self._over = True
        for scope in self._shields:
            scope.cancel()
