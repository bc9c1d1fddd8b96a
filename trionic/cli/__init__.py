"""The ``trionic`` command: one module for each of its commands, imported when it is asked for."""

from __future__ import annotations

from trionic.cli._group import main

__all__ = ["main"]
