"""What the command refuses: each error is one line that says what to do."""

from __future__ import annotations

from typing import Final

__all__ = ["ONE_CLIENT", "SERVER_THERE", "ConfigError", "TrionicError"]

# What to look for, where a server does not answer or cannot be reached.
ONE_CLIENT: Final = "a server has one client at a time, is one there?"
SERVER_THERE: Final = "is `trionic serve` or another vfio-user server there?"


class TrionicError(Exception):
    """A reason to stop, told in one line for the person at the keyboard."""


class ConfigError(TrionicError):
    """A setting that no card can have; names where it stands and what is allowed."""
