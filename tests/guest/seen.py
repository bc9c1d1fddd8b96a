"""What the host sees of its cards while a guest uses them: their DMA windows, and what they log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

Windows = list[tuple[int, int, int, bool]]
"""Address, size, protection and whether there is a descriptor, as `DmaWindows.windows` has them."""

READ_WRITE: Final = 3


@dataclass(frozen=True, slots=True)
class Span:
    """Windows without a gap between them."""

    start: int
    size: int
    window: int
    """The size of each of them."""
    has_descriptor: bool


def span(windows: Windows) -> Span:
    """All of these, which have to be alike and one behind the other, for reading and writing."""
    ((size, prot, has_descriptor),) = {window[1:] for window in windows}
    start = windows[0][0]
    assert prot == READ_WRITE
    assert [window[0] for window in windows] == [start + n * size for n in range(len(windows))]
    return Span(start, size * len(windows), size, has_descriptor)


@contextmanager
def kept_warnings(kept: list[str]) -> Iterator[None]:
    """Add what is logged as a warning or worse."""

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record.getMessage())

    keeper = Keeper(logging.WARNING)
    logging.getLogger().addHandler(keeper)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(keeper)
