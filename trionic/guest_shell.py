"""A guest with a card, by the tests' rig: starts what the guest needs beside it and ends that with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final

import click

from trionic.config import DEFAULT_PORT
from trionic.errors import TrionicError

__all__ = ["run"]

_CHECKOUT: Final = Path(__file__).parent.parent

# What is started here listens within a fraction of this.
_PATIENCE_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.02


def run(sockets: Sequence[Path], port: str | None, rig_arguments: Sequence[str]) -> int:
    """Boot a guest with the cards at ``sockets``, or with one of its own on ``port``; the rig's exit status.

    Raises `TrionicError` where there is no rig, or what the guest needs does not start.
    """
    if not (_CHECKOUT / "tests" / "guest" / "__main__.py").exists():
        raise TrionicError(
            "the guest is part of the source's tests, which are not installed; run `make guest` in a"
            " checkout, or attach a QEMU of yours by the line that `trionic serve` prints"
        )
    if sockets and port is not None:
        raise TrionicError("--port is for the guest's own card; those at --socket have theirs already")
    missing = next((path for path in sockets if not path.is_socket()), None)
    if missing is not None:
        raise TrionicError(f"{missing}: no socket; start `trionic serve --socket {missing}` first")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is beside the guest ends with it
    with contextlib.ExitStack() as beside:
        paths = list(sockets) or [beside.enter_context(_own_card(port))]
        command = [sys.executable, "-m", "tests.guest", "shell"]
        for path in paths:
            command += ["--socket", str(path.absolute())]
        return subprocess.run([*command, *rig_arguments], cwd=_CHECKOUT, check=False).returncode


@contextlib.contextmanager
def _own_card(port: str | None) -> Iterator[Path]:
    with contextlib.ExitStack() as beside:
        folder = Path(beside.enter_context(tempfile.TemporaryDirectory(prefix="trionic-")))
        if port is None and (passt := shutil.which("passt")):
            network = _folder_for_passt(folder) / "passt.sock"
            command = [passt, "--foreground", "--quiet", "--socket", str(network)]
            beside.enter_context(_running(command, lambda _: network.is_socket()))
            port = f"stream:path={network}"
            click.echo("The network is this machine's, through passt: `ip link set eth0 up; udhcpc -i eth0`.")
        elif port is None:
            port = DEFAULT_PORT
            click.echo(
                "passt is not installed: the guest hears only itself. --port tap:name=… gives it more."
            )
        card = folder / "card.sock"
        command = [sys.executable, "-m", "trionic", "serve", "--log-level", "warning"]
        beside.enter_context(_running([*command, "--socket", str(card), "--port", port], _says_ready))
        yield card


def _folder_for_passt(folder: Path) -> Path:
    """Where passt may make its socket: started by root, it becomes nobody before it does."""
    own = folder / "passt"
    own.mkdir(mode=0o700)
    if os.geteuid() == 0:
        folder.chmod(0o711)
        shutil.chown(own, "nobody")
    return own


@contextlib.contextmanager
def _running(command: Sequence[str], ready: Callable[[IO[bytes]], bool]) -> Iterator[None]:
    """A program of its own session, where Ctrl-C for the guest does not reach it.

    ``ready`` gets the program's output and says whether it is there: asked until it is, or the program ends.
    """
    words = tempfile.TemporaryFile()  # noqa: SIM115  (open for as long as the program runs)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words, start_new_session=True
    )
    assert process.stdout is not None
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not ready(process.stdout):
            if process.poll() is not None or time.monotonic() > deadline:
                words.seek(0)
                last = words.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise TrionicError(f"{Path(command[0]).name} does not start: {last}")
            time.sleep(_LOOK_AGAIN_S)
        yield
    finally:
        words.close()
        process.stdout.close()
        process.terminate()
        try:
            process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _says_ready(output: IO[bytes]) -> bool:
    """Waits for the word of `trionic serve`, or its end."""
    return any(line == b"READY=1\n" for line in output)
