"""Recordings of what drivers in guests do to a card, against those that tests.traces has and does again.

With TRIONIC_RECORD=1 in the environment these are made anew.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from device.recorder import Recorder
from tests.guest.cards import ServedCard
from tests.traces.recordings import RECORDED, normalised, read_recording


class Recordings:
    """What was recorded of each card, taken off as the sections end."""

    def __init__(self, cards: Sequence[ServedCard]) -> None:
        self.lines: list[list[str]] = [[] for _ in cards]
        for lines, card in zip(self.lines, cards, strict=True):
            Recorder(card.nic.card, partial(self._put, lines))

    @staticmethod
    def _put(lines: list[str], line: bytes) -> None:
        lines.append(line.decode().rstrip("\n"))

    def take(self, card: int) -> list[str]:
        taken = self.lines[card].copy()
        self.lines[card].clear()
        return taken


def check(name: str, lines: list[str]) -> None:
    """AssertionError if the recording of this name is another driver's."""
    if os.environ.get("TRIONIC_RECORD"):
        (RECORDED / f"{name}.trace").write_text("".join(f"{line}\n" for line in lines))
    assert normalised(lines) == normalised(read_recording(name)), name
