"""What the command refuses: each error is one line that says what to do."""

from __future__ import annotations

__all__ = ["ConfigError", "TrionicError"]


class TrionicError(Exception):
    """A reason to stop, told in one line for the person at the keyboard."""


class ConfigError(TrionicError):
    """A setting that no card can have; names where it stands and what is allowed."""
