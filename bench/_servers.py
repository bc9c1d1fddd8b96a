"""Servers as processes of their own: built, started on a CPU, frozen while others are measured, ended."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.peers.cache import PeerError, cached
from tests.peers.debian import require_host_package, run
from tests.peers.libvfio_user import libvfio_user

HERE = Path(__file__).resolve().parent
GCC = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]

DEFAULT_COMMAND = f"{shlex.quote(sys.executable)} -m trionic serve --log-level warning --socket {{socket}}"
START_PATIENCE = 10.0


def compiled(name: str, source: Path, flags: Sequence[str] = ()) -> Path:
    """One C file as a program in the cache; edited sources or headers and other flags give another one."""

    def build(work: Path) -> None:
        require_host_package("gcc", Path("/usr/bin/gcc"))
        require_host_package("libc6-dev", Path("/usr/include/stdlib.h"))
        run([*GCC, "-o", work / name, source, *flags])

    sources = [source, *sorted(source.parent.glob("*.h"))]
    recipe = "\n".join([*GCC, *flags, *(one.read_text(encoding="utf-8") for one in sources)])
    return cached(name, recipe, build) / name


def register_client() -> Path:
    """The C client that measures every server."""
    return compiled("register_client", HERE / "_c_client" / "register_client.c")


def dma_client() -> Path:
    """The same for DMA windows."""
    return compiled("dma_client", HERE / "_c_client" / "dma_client.c")


def libvfio_user_command(*, poll: bool = False) -> str:
    """The C server to compare with, as a command whose ``{socket}`` is to be filled in."""
    program = compiled(
        "lvu_register_server", HERE / "peers" / "lvu_register_server.c", libvfio_user().compile_flags
    )
    return f"{shlex.quote(str(program))} {'--poll ' if poll else ''}{{socket}}"


def libvfio_user_dma_command() -> str:
    """The C server that takes DMA windows, as `libvfio_user_command` gives that of registers."""
    program = compiled(
        "lvu_dma_bench_server", HERE / "peers" / "lvu_dma_server.c", libvfio_user().compile_flags
    )
    return f"{shlex.quote(str(program))} {{socket}}"


class Server:
    """A vfio-user server, alone in its process group.

    It stays in the session of whoever measures, and so in the scheduling group (autogroup) of the client and
    of `busy`: only there do they compete for a CPU as threads of one process would.
    """

    def __init__(self, command: str, path: Path, cpu: int | None = None) -> None:
        """Start `command` with its ``{socket}`` filled in, pinned to `cpu` with everything it starts."""
        self.path = path
        self._words = [word.replace("{socket}", str(path)) for word in shlex.split(command)]
        if cpu is not None:
            self._words[:0] = ["taskset", "-c", str(cpu)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._started = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                process_group=0,
            )
        except OSError as error:
            self._errors.close()
            raise PeerError(f"{self._words[0]}: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def wait_until_listening(self) -> float:
        """Seconds from starting the program to its socket taking a connection.

        Raises `PeerError` with the program's last words if that never happens.
        """
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                try:
                    probe.connect(str(self.path))
                except OSError:
                    taken = time.perf_counter() - self._started
                else:
                    return time.perf_counter() - self._started
            if self._process.poll() is not None or taken > START_PATIENCE:
                raise PeerError(self._obituary())
            time.sleep(0.0005)

    def explain(self, error: Exception) -> None:
        """Note on an error how the server ended, if it did."""
        if self._process.poll() is not None:
            error.add_note(self._obituary())

    def _obituary(self) -> str:
        status = self._process.poll()
        late = f"did not listen within {START_PATIENCE:g} s"
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip()[-2000:]
        fate = late if status is None else f"ended with status {status}"
        return f"`{shlex.join(self._words)}` {fate}" + (f":\n{last}" if last else "")

    def freeze(self) -> None:
        """Take the server's CPU time away, so that whatever it does when idle cannot disturb another one."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the server run again."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the server politely, then not politely; its socket is gone afterwards."""
        if self._process.poll() is None:
            self.thaw()
            self._process.terminate()
            try:
                self._process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._errors.close()
        self.path.unlink(missing_ok=True)


@contextmanager
def busy(cpu: int) -> Iterator[None]:
    """Something on `cpu` that never sleeps, of the servers' own priority, while the block runs."""
    hog = subprocess.Popen(
        ["taskset", "-c", str(cpu), sys.executable, "-S", "-c", "while True: pass"], stdin=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        hog.kill()
        hog.wait()


@contextmanager
def running(command: str, path: Path, cpu: int | None = None) -> Iterator[Server]:
    """A server that listens when the block begins and is gone when it ends.

    If the block fails after the server ended by itself, the error has the server's last words as a note.
    """
    server = Server(command, path, cpu)
    try:
        server.wait_until_listening()
        yield server
    except Exception as error:
        server.explain(error)
        raise
    finally:
        server.stop()
