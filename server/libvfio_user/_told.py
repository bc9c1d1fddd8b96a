"""What of a client's doings is logged."""

from __future__ import annotations

import logging

__all__ = ["Told", "log"]

log = logging.getLogger("trionic.server")


class Told:
    """Warnings about the client of the card ``name``, ``limit`` of them at most: a client can bring about as
    many as it likes.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name = name
        self._left = limit

    def __call__(self, text: str, error: BaseException | None = None) -> None:
        if self._left > 0:
            self._left -= 1
            log.warning("%s: %s", self._name, text, exc_info=error)
            if self._left == 0:
                log.warning("%s: no more of this client is told", self._name)
