"""Recordings of real drivers, made by `trionic serve --record` and kept in `recorded`.

Each is one driver's life on a card, in sections that begin with a line `# --- NAME`: from where it takes the
card to where it lets go. `test_recordings` of tests.guest makes them anew, and compares.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tests.traces.registers import Lines

RECORDED: Final = Path(__file__).parent / "recorded"

SECTION: Final = "# --- "

_ADDRESSES: Final = ("common.queue_desc", "common.queue_driver", "common.queue_device")


def read_recording(name: str) -> list[str]:
    """Its lines."""
    return (RECORDED / f"{name}.trace").read_text().splitlines()


def steps_of(lines: Iterable[str]) -> Lines:
    """The accesses of a recording."""
    return [line.split() for line in lines if not line.startswith("#")]


def is_ring_state(verb: str, place: str) -> bool:
    """Whether this is an access to ring state: by 32 bits the third dword is the number of queue pairs."""
    return place.startswith("lm+0x2") and not (verb[1] == "4" and place == "lm+0x28")


def normalised(lines: Iterable[str]) -> list[str]:
    """What recordings of one driver have in common.

    Addresses and ring state are left out, and where sections begin: kernels do some of their work later.
    Doorbells and looks at the ISR byte are listed by their kinds, at the end: how many there are, and between
    which other steps, is a matter of the moment.
    """
    said: list[str] = []
    kinds: set[str] = set()
    for verb, place, *value in steps_of(lines):
        structure = place.partition("+")[0]
        if structure == "isr":
            kinds.add(f"{verb} {place}")
        elif structure == "notify":
            kinds.add(" ".join((verb, place, *value)))
        else:
            varies = structure in _ADDRESSES or is_ring_state(verb, place)
            said.append(" ".join((verb, place, *([] if varies else value))))
    return said + sorted(kinds)
