"""What a network driver counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """What went through the driver; `kicks` are notifications, `interrupts` those that were heard."""

    sent: int = 0
    received: int = 0
    kicks: int = 0
    interrupts: int = 0
