"""Runs the command as users do: in a process of its own, by its own interpreter."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# Long enough for the slowest machine; no test that passes waits for it.
PATIENCE_S = 60.0


def run(*args: str | Path, setup: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    """The command's output and exit status."""
    return subprocess.run(
        _words(args), capture_output=True, text=True, check=False, timeout=PATIENCE_S, preexec_fn=setup
    )


def refusal(*args: str | Path, setup: Callable[[], None] | None = None) -> str:
    """The one line with which the command refuses, without its own name."""
    done = run(*args, setup=setup)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("trionic: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.endswith("\n")
    return done.stderr.removeprefix("trionic: ").rstrip("\n")


class Serving:
    """A `trionic serve` that is ready."""

    def __init__(self, process: subprocess.Popen[str], said: list[str]) -> None:
        self.process = process
        self.said = said

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; the exit status and what it said on standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, errors


@contextmanager
def serving(*args: str | Path, fds: Sequence[socket.socket] = ()) -> Iterator[Serving]:
    """`trionic serve` with these arguments and sockets, from its ready line on."""
    process = start("serve", *args, fds=fds)
    try:
        assert process.stdout is not None
        said = list(_until_ready(process.stdout))
        yield Serving(process, said)
    finally:
        process.kill()
        process.communicate()


def start(*args: str | Path, fds: Sequence[socket.socket] = ()) -> subprocess.Popen[str]:
    """The command, running; it has these sockets by the numbers that they have here."""
    return subprocess.Popen(
        _words(args),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        pass_fds=[one.fileno() for one in fds],
    )


def _words(args: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "trionic", *[os.fspath(arg) for arg in args]]


def _until_ready(output: IO[str]) -> Iterator[str]:
    for line in output:
        if line == "READY=1\n":
            return
        yield line.rstrip("\n")
    raise AssertionError("the server ended before it was ready")
