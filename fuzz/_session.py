"""Whole sessions: a script of a client's bytes and descriptors, played against a card that is served."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fuzz._choices import Choices
from fuzz._house import House
from fuzz._player import play
from fuzz._zoo import Zoo


class Session:
    """The target: `run(data)` is one client's stay."""

    name = "session"

    def __init__(self) -> None:
        self.exchanges = 0
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self._zoo = Zoo()
        self._house = House(Path(self._folder.name))

    def close(self) -> None:
        """The server and all it had is gone afterwards; raises what went wrong in it."""
        try:
            self._house.close()
        finally:
            self._zoo.close()
            self._folder.cleanup()

    def seeds(self) -> list[bytes]:
        """Scripts have no form to be kept to; long ones get further."""
        return [bytes([act] * 64 + list(range(256))) for act in range(32)]

    def run(self, data: bytes) -> None:
        """One connection, and what is left of it."""
        self.exchanges += play(self._house, self._zoo, Choices(data))
