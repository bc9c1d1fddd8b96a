"""A nursery for the background tasks of one object, whose users see their own exceptions and no groups."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery that is cancelled when the body ends. If one exception came out of it, that one is raised,
    not a group of one.
    """
    sole: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        sole = _sole(group)
        if sole is None:
            raise
    if sole is not None:
        try:
            raise sole
        finally:
            del sole


def _sole(group: BaseExceptionGroup[BaseException]) -> BaseException | None:
    others = [error for error in group.exceptions if not isinstance(error, trio.Cancelled)]
    if not others:
        return group.exceptions[0]
    return others[0] if len(others) == 1 else None
