"""Plays the acts of the demonstration on a card served by a child process, and shows the table."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Final

import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from client import ClientError
from trionic.demonstration import ACTS, PATIENCE_S, DemoError, Done, Stage
from trionic.errors import TrionicError

__all__ = ["run"]

# A server that takes longer than this to end is killed.
_FAREWELL_S: Final = 5.0

# Columns where no terminal says how many it has.
_FILE_WIDTH: Final = 120

FAILED: Final = 1
"""Exit status if an act failed."""


@dataclass(slots=True)
class _Line:
    name: str
    seconds: float = 0.0
    done: Done | None = None
    failure: str = ""
    running: bool = False


def run() -> int:
    """Play all acts; 0 if all went well, else `FAILED`. Ctrl-C is raised as KeyboardInterrupt, never in a
    group.
    """
    try:
        return trio.run(_play)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt):
            raise KeyboardInterrupt from group
        raise


async def _play() -> int:
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    lines = [_Line("server start"), *(_Line(act.name) for act in ACTS)]
    with tempfile.TemporaryDirectory(prefix="trionic-") as folder:
        stage = Stage(Path(folder) / "card.sock", Path(folder) / "spare.sock")
        with Live(console=console, get_renderable=lambda: _table(lines), transient=False):
            start = perf_counter()
            lines[0].running = True
            async with _served(stage.card), _served(stage.spare):
                lines[0].seconds = perf_counter() - start
                lines[0].running = False
                lines[0].done = Done(2, "cards", "loopback ports, listening")
                for act, line in zip(ACTS, lines[1:], strict=True):
                    line.running = True
                    start = perf_counter()
                    try:
                        with trio.fail_after(PATIENCE_S):
                            line.done = await act.play(stage)
                    except trio.TooSlowError:
                        line.failure = f"not done within {PATIENCE_S:g} s"
                    except (ClientError, DemoError, OSError) as error:
                        line.failure = str(error)
                    line.seconds = perf_counter() - start
                    line.running = False
    failed = [line for line in lines if line.failure]
    if failed:
        console.print(f"{len(failed)} of {len(lines)} failed", style="red")
        return FAILED
    return 0


@asynccontextmanager
@trio.lowlevel.enable_ki_protection
async def _served(path: Path) -> AsyncIterator[None]:
    """`trionic serve` in a child process; a `TrionicError` with its last words if it does not start.

    Ctrl-C waits for a checkpoint, so it cannot come between the child's birth and the promise to end it.
    """
    command = [sys.executable, "-m", "trionic", "serve", "--log-level", "warning", "--socket", str(path)]
    # In a session of its own: Ctrl-C is for the demonstration, which ends the server when it is done with it.
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout is not None
        said = b""
        async with process.stdout as output:
            async for piece in output:
                said += piece
                if b"READY=1" in said:
                    break
            else:
                raise TrionicError("the server did not start; its own words are above")
        yield
    finally:
        process.terminate()
        try:
            with trio.CancelScope(shield=True), trio.move_on_after(_FAREWELL_S):
                await process.wait()
        finally:
            process.kill()


def _table(lines: list[_Line]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for header, justify in (
        ("act", "left"),
        ("count", "right"),
        ("", "left"),
        ("time", "right"),
        ("", "left"),
    ):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    for line in lines:
        if line.running:
            table.add_row(line.name, "", "", "", Spinner("dots"))
        elif line.failure:
            table.add_row(line.name, "", "", _time(line.seconds), f"[red]failed: {line.failure}[/red]")
        elif line.done is not None:
            done = line.done
            table.add_row(line.name, f"{done.count:,}", done.unit, _time(line.seconds), done.remark)
        else:
            table.add_row(line.name, "", "", "", "", style="dim")
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"
