"""Descriptors that came with messages and that nobody took over."""

from __future__ import annotations

import os
from collections.abc import Iterable

__all__ = ["close_all"]


def close_all(fds: Iterable[int]) -> None:
    """Close each of them."""
    for fd in fds:
        os.close(fd)
