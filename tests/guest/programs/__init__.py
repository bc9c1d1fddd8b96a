"""Programs of our own for guests: one C file each, which needs nothing of the guest but its kernel. What they
do they tell a line a step, as ``steps.h`` has it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bench._servers import compiled
from tests.conftest import cannot
from tests.peers.cache import PeerError

_HERE = Path(__file__).parent
_STEP = re.compile(r"^step (\S+) (ok|fail) (.*)$", re.MULTILINE)


def program(name: str) -> Path:
    """The program, for the option `files` of guests; without a compiler it ends the running test."""
    try:
        return compiled(name, _HERE / f"{name}.c", ["-static"])
    except PeerError as missing:
        cannot(str(missing))


@dataclass(frozen=True, slots=True)
class Step:
    """A line of a program."""

    name: str
    good: bool
    detail: str


def read_steps(output: str) -> list[Step]:
    """What a program did, in its order."""
    return [Step(name, verdict == "ok", detail.strip()) for name, verdict, detail in _STEP.findall(output)]
