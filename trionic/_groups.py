"""Errors that come in groups, because several tasks may fail at once, and are told one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["first_of", "ungrouped"]


def first_of(
    group: BaseExceptionGroup[BaseException], kinds: tuple[type[BaseException], ...]
) -> BaseException | None:
    """The first error of the group; None if one of them is of none of these kinds."""
    if group.subgroup(lambda error: not isinstance(error, (*kinds, BaseExceptionGroup))):
        return None
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    return first


@contextmanager
def ungrouped(*kinds: type[BaseException]) -> Iterator[None]:
    """Raise the first error of a group by itself, and Ctrl-C as KeyboardInterrupt. A group with an error of
    none of these kinds is raised whole.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt):
            raise KeyboardInterrupt from group
        first = first_of(group, kinds)
        if first is None:
            raise
        raise first from None
