"""Cards in processes of their own, and what the kernel says of those: what they have mapped, what is open."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import trio

from device.revocation import Revocation

ROOT: Final = Path(__file__).resolve().parents[3]
PATIENCE_S: Final = 60
"""For what takes milliseconds; no test that passes waits for it."""


class Served:
    """A card that is served at `path`."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self.path = path
        self.process = process
        self.pid = process.pid

    def maps(self, inode: int) -> bool:
        """Whether it has mapped this file."""
        return inode in mapped_files(self.pid)

    def open_files(self) -> Counter[str]:
        """What its descriptors are, without numbers that change."""
        return open_files(self.pid)

    @property
    def alive(self) -> bool:
        """Whether nothing has ended it yet."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL: nobody tells anybody anything."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving_card(
    path: Path, revocation: Revocation = Revocation.COOPERATIVE, *, stays: bool = True
) -> Iterator[Served]:
    """`trionic serve`: a network card whose port is a loopback. That it died is seen in the end if it
    `stays`.
    """
    words = ["trionic", "serve", "--socket", os.fspath(path), "--port", "loopback"]
    words += ["--revocation", revocation.value, "--log-level", "error"]
    with _process(words, path, stays=stays) as served:
        yield served


@contextmanager
def serving_engine(path: Path, revocation: Revocation = Revocation.COOPERATIVE) -> Iterator[Served]:
    """An `engine.Engine`."""
    with _process(["tests.client.peering.engine", os.fspath(path), revocation.value], path) as served:
        yield served


@contextmanager
def _process(words: Sequence[str], path: Path, *, stays: bool = True) -> Iterator[Served]:
    with (path.with_suffix(".errors")).open("w+b") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line == b"READY=1\n":
                    break
            yield Served(path, process)
            assert process.poll() is None or not stays, "it died"
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        errors.seek(0)
        assert errors.read() == b"", "it complained"


def mapped_files(pid: int | str = "self") -> Counter[int]:
    """Inodes of the files that a process has mapped, and how many areas of each."""
    lines = Path(f"/proc/{pid}/maps").read_text("utf-8").splitlines()
    return Counter(int(line.split()[4]) for line in lines)


def areas(pid: int | str = "self") -> int:
    """How many areas of memory a process has."""
    return sum(mapped_files(pid).values())


def lent_areas() -> Counter[str]:
    """Areas of this process that are memfds, by their names."""
    lines = Path("/proc/self/maps").read_text("utf-8").splitlines()
    return Counter(line.split()[5] for line in lines if "/memfd:" in line)


def open_files(pid: int | str = "self") -> Counter[str]:
    """What the descriptors of a process are, without numbers that change."""
    found: Counter[str] = Counter()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[entry.readlink().as_posix().split("[")[0]] += 1
        except FileNotFoundError:  # the one that lists them
            continue
    return found


async def until(satisfied: Callable[[], bool]) -> None:
    """Another process or thread does it, and says nothing."""
    with trio.fail_after(PATIENCE_S):
        while not satisfied():
            await trio.lowlevel.checkpoint()


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """In this process."""
    files, lent = open_files(), lent_areas()
    yield
    assert open_files() == files
    assert lent_areas() == lent


@asynccontextmanager
async def leaving_nothing(*cards: Served) -> AsyncIterator[None]:
    """In any process, once the sessions are over."""
    before = [card.open_files() for card in cards]
    with nothing_left_open():
        yield
    for card, files in zip(cards, before, strict=True):
        await until(lambda card=card, files=files: card.open_files() == files)  # type: ignore[misc]
