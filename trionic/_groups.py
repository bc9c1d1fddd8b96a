"""Errors that come in groups, because several tasks may fail at once, and are told one by one."""

from __future__ import annotations

__all__ = ["first_of"]


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
