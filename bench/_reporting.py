"""How every benchmark tells what it measured."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table


def require_both_cpus() -> None:
    """Refuse, as a command line does, where this process may not pin to CPUs 0 and 1."""
    if {0, 1} - os.sched_getaffinity(0):
        raise click.ClickException("this benchmark pins to CPUs 0 and 1, which this process may not both use")


def report(
    outcomes: Sequence[Any], table: Callable[[Sequence[Any]], Table], *, as_json: bool, check: bool
) -> None:
    """Print dataclasses that know whether they have `met` their target; with `check` the exit status is 1
    unless all have.
    """
    if as_json:
        print(json.dumps([asdict(outcome) | {"met": outcome.met} for outcome in outcomes], indent=2))
    else:
        Console().print(table(outcomes))
    if check and not all(outcome.met for outcome in outcomes):
        sys.exit(1)
