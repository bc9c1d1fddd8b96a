"""``trionic conform``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from trionic.errors import ONE_CLIENT, SERVER_THERE, TrionicError

if TYPE_CHECKING:
    from conformance import Check, Host
    from trionic.conforming import Report

__all__ = ["conform"]

PATIENCE_S: Final = 2.0
"""A server that is alive answers in a millisecond; one that hangs costs this for each check."""

_SEVERITIES: Final = ("must", "should", "extension")


@click.command()
@click.argument("socket", type=click.Path(path_type=Path), required=False)
@click.option(
    "--client",
    "as_server",
    is_flag=True,
    help="Serve a small device at SOCKET and watch the client that connects, until it leaves.",
)
@click.option(
    "--start",
    metavar="COMMAND",
    help="Start the server anew for each check; {socket} in COMMAND is where it has to listen.",
)
@click.option(
    "--only", metavar="GLOB", multiple=True, help="Check these alone, such as 'dma-*'; may be repeated."
)
@click.option(
    "--least",
    type=click.Choice(_SEVERITIES),
    default="extension",
    show_default=True,
    help="The least binding checks that are made.",
)
@click.option("--destructive", is_flag=True, help="Also stop, migrate and overwrite what is there.")
@click.option(
    "--expect",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Known failures: TOML, check id = reason.",
)
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit XML as well.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=PATIENCE_S,
    show_default=True,
    metavar="S",
    help="Seconds to wait for an answer.",
)
@click.option("--list", "listing", is_flag=True, help="List the checks and what they demand, and exit.")
@click.option("-v", "--verbose", is_flag=True, help="Show checks that passed or do not apply, too.")
@click.pass_context
def conform(
    ctx: click.Context,
    socket: Path | None,
    as_server: bool,
    start: str | None,
    only: tuple[str, ...],
    least: str,
    destructive: bool,
    expect: Path | None,
    junit: Path | None,
    timeout: float,
    listing: bool,
    verbose: bool,
) -> None:
    """Hold the vfio-user server at SOCKET against the specification: any server, not only this one.

    Each check is one statement of QEMU's docs/interop/vfio-user.rst, tried on a connection of its own. A
    failure says what was expected and what came. What a server does not offer is not applicable, and no
    failure. "must" is what the text says, "should" what it advises, "extension" what the kernel's VFIO and
    all known peers do where the text is silent.

    Nothing is written to the device but the interrupt line register of its configuration space, which is
    software's own, and bus mastering before a reset. The device is reset if it announces that it can be.
    With --destructive it is also stopped and migrated onto itself: not for a card that a guest is using.

    Exit status: 0 if every failure was expected, 1 if not, 2 if the checks cannot be made.

    \b
    Examples:
      trionic conform /tmp/card.sock
      trionic conform --only 'dma-*' -v /tmp/card.sock
      trionic conform --start 'gpio-pci-idio-16 {socket}' --expect known.toml /tmp/gpio.sock
      trionic conform --client /tmp/watch.sock     # then start QEMU with this socket

    \b
    known.toml:
      [dma-map]
      overlap = "EINVAL instead of EEXIST, since 2020"
    """
    from rich.console import Console

    from conformance import (
        CLIENT_CHECKS,
        SERVER_CHECKS,
        ExpectationError,
        Severity,
        read_expectations,
        select,
    )
    from trionic.conforming import Report, list_checks

    every = CLIENT_CHECKS if as_server else SERVER_CHECKS
    severities = [Severity(name) for name in _SEVERITIES[: _SEVERITIES.index(least) + 1]]
    checks = select(every, only, severities=severities, destructive=destructive or listing)
    console = Console(highlight=False, soft_wrap=not listing)
    if not checks:
        raise TrionicError(f"no check is called {' or '.join(only)}; see trionic conform --list")
    if listing:
        list_checks(console, checks)
        return
    if socket is None:
        raise TrionicError("no SOCKET; say where the server listens, or with --client where to listen")
    if as_server and start is not None:
        raise TrionicError("--start starts a server, and --client watches a client; choose one")
    if junit is not None and not os.access(junit if junit.exists() else junit.parent, os.W_OK):
        raise TrionicError(f"{junit}: nothing can be written there")
    try:
        expected = read_expectations(expect, {check.id for check in every}) if expect else {}
    except ExpectationError as error:
        raise TrionicError(str(error)) from error
    report = Report(console, expected, verbose=verbose)
    if as_server:
        _watch(socket, checks, report, timeout, destructive=destructive)
    else:
        _check(socket, start, checks, report, timeout)
    good = report.end(str(socket))
    if junit is not None:
        _write(junit, report, str(socket))
    ctx.exit(0 if good else 1)


def _check(path: Path, start: str | None, checks: Sequence[Check], report: Report, patience: float) -> None:
    import trio

    from conformance import GoneError, Listening, Silent, Started, reach, run_checks

    if start is not None and not start.strip():
        raise TrionicError("--start: no command; write it as for a shell, with {socket} where the path goes")
    try:
        host: Host = Listening(path, patience) if start is None else Started(start, path, patience)
    except ValueError as error:
        raise TrionicError(f"--start: {start} is no command: {error}") from error
    try:
        trio.run(reach, host)
    except GoneError as error:
        raise TrionicError(f"{error}; {SERVER_THERE}") from error
    except Silent as error:
        raise TrionicError(f"{path}: {error}; {ONE_CLIENT}") from error
    trio.run(run_checks, checks, host, report.told)


def _watch(
    path: Path, checks: Sequence[Check], report: Report, patience: float, *, destructive: bool
) -> None:
    import trio

    from conformance import listening, watch

    wanted = {check.id for check in checks}

    async def serve_one() -> None:
        for result in await watch(listener, patience=patience, destructive=destructive):
            if result.check.id in wanted:
                report.told(result)

    try:
        with listening(path) as listener:
            click.echo("READY=1")
            trio.run(serve_one)
    except OSError as error:
        raise TrionicError(f"{path}: cannot listen here: {error.strerror or error}") from error


def _write(path: Path, report: Report, name: str) -> None:
    from conformance import write_junit

    try:
        write_junit(path, report.results, name)
    except OSError as error:
        raise TrionicError(f"{path}: {error.strerror}") from error
