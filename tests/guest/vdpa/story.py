"""A guest's whole run, told in steps: many sentences are about one boot."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from tests.guest import Card, Guest, Root, boot
from tests.guest.cards import ServedCard
from tests.guest.conftest import qemu_warnings
from tests.guest.vdpa.kernel_log import KERNEL_ARGS, complaints
from trionic.engines import NATIVE, EngineConfig

PATIENCE: Final = 120
"""Seconds for a guest of some ten on an idle machine."""

FUNCTIONS: Final = """
step() { printf '\\n== %s\\n' "$1"; }
refused() { if "$@"; then echo "was not refused: $*"; return 1; fi; }
"""
"""For scripts: `step NAME` begins a step, `refused COMMAND` demands that it fails."""

_STEP: Final = re.compile(r"^== (\S+)\n", re.MULTILINE)


class Story:
    """What a script with `FUNCTIONS` printed, by its steps, and what became of its guest."""

    def __init__(self) -> None:
        self.output = ""
        self.complaints: list[str] = []
        """Of its kernel: `tests.guest.vdpa.kernel_log`."""
        self.seen: dict[str, Any] = {}
        """What the host's half put here."""

    def step(self, name: str) -> str:
        """What was printed in this step; AssertionError if the script did not get there."""
        _, *parts = _STEP.split(self.output)
        steps = dict(zip(parts[::2], parts[1::2], strict=True))
        assert name in steps, f"the script did not come to {name}, only to {list(steps)}"
        return steps[name]

    @asynccontextmanager
    async def told(
        self,
        script: str,
        cards: Sequence[ServedCard | Card],
        root: Root,
        engine: EngineConfig = NATIVE,
        *,
        expected_complaints: Sequence[str] = (),
        deadline: float = PATIENCE,
        **options: Any,
    ) -> AsyncIterator[Guest]:
        """Boot a guest that runs `script`, by `tests.guest.boot` with `options`, for the block to steer; at
        the block's end it has come to its end, QEMU having nothing to say.
        """
        async with boot(
            FUNCTIONS + script,
            [card if isinstance(card, Card) else card.socket for card in cards],
            root=root,
            expected_warnings=qemu_warnings(engine),
            kernel_args=KERNEL_ARGS,
            deadline=deadline,
            **options,
        ) as guest:
            yield guest
            result = await guest.wait()
        self.output = result.output
        self.complaints = complaints(result.console, expected_complaints)
