"""The command's log, which clients and guests have a hand in: whatever they do again and again, they cannot
fill a disk with it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

__all__ = ["LINES_AT_ONCE", "LINES_PER_SECOND", "Ration", "configure"]

_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"

LINES_AT_ONCE: Final = 500
"""Entries that may follow each other without a pause: more than any number of cards says while it starts."""

LINES_PER_SECOND: Final = 1.0
"""Entries for each second afterwards: some 10 MB a day, and still a sign of life of what goes on."""


class Ration(logging.Filter):
    """Lets entries through while there is a ration of them; how many it kept is told with the next one.

    Whoever else limits what he says (a session, a control queue) does so for one client or one driver's life,
    and lives are short; this is for all of them together.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._now = now
        self._left = float(LINES_AT_ONCE)
        self._filled = now()
        self._kept = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the entry is told."""
        now = self._now()
        self._left = min(LINES_AT_ONCE, self._left + (now - self._filled) * LINES_PER_SECOND)
        self._filled = now
        if self._left < 1:
            self._kept += 1
            return False
        self._left -= 1
        if self._kept:
            record.msg = f"{record.getMessage()} ({self._kept} entries before it were too many to be told)"
            record.args = None
            self._kept = 0
        return True


def configure(level: str) -> None:
    """Log to stderr from ``level`` on."""
    logging.basicConfig(level=level.upper(), format=_FORMAT)
    ration = Ration()
    for handler in logging.getLogger().handlers:
        handler.addFilter(ration)
