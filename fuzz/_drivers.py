"""Who makes up the bytes: atheris, which looks for those that reach new code, or chance without it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn, Protocol

MAX_INPUT: Final = 2048
"""Bytes of one input: some hundred decisions. Longer ones find little more and are slow to make smaller."""

HANG: Final = 60
"""Seconds after which one input is a hang: far more than the longest patience inside a target."""

WARM_UP: Final = 200
"""Inputs until all that is made once has been made; memory is compared from then on."""

MAX_GROWTH: Final = 64 << 20
"""Bytes by which a target may grow from then on: corpora and free lists do, leaks do not stop there."""


class Target(Protocol):
    """What is tried: `run` raises for whatever goes wrong."""

    name: str
    exchanges: int

    def run(self, data: bytes) -> None:
        """Try one input."""

    def seeds(self) -> list[bytes]:
        """Inputs to begin with."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(slots=True)
class Report:
    """What came of it. Times in seconds, memory in bytes."""

    target: str
    driver: str
    inputs: int = 0
    exchanges: int = 0
    seconds: float = 0.0
    per_second: int = 0
    peak_memory: int = 0
    growth: int = 0
    fds_before: int = 0
    fds_after: int = 0

    def as_dict(self) -> dict[str, object]:
        """All of it by name."""
        return asdict(self)


class LeakError(AssertionError):
    """Memory or descriptors are missing at the end."""


class Run:
    """Tries inputs with `target` until it had `exchanges` or `seconds` are over."""

    def __init__(self, target: Target, driver: str, *, seconds: float, exchanges: int) -> None:
        self.target = target
        self._most = exchanges
        self._started = time.monotonic()
        self._until = self._started + seconds
        self._memory = 0
        self.report = Report(target.name, driver, fds_before=_fds())

    @property
    def over(self) -> bool:
        """Whether it was enough."""
        return self.target.exchanges >= self._most or time.monotonic() >= self._until

    def one(self, data: bytes) -> None:
        """Try one input."""
        self.target.run(data)
        self.report.inputs += 1
        if self.report.inputs == WARM_UP:
            self._memory = _resident()

    def finish(self) -> Report:
        """Count; raises LeakError."""
        report = self.report
        report.exchanges = self.target.exchanges
        report.seconds = round(time.monotonic() - self._started, 1)
        report.per_second = round(report.exchanges / max(report.seconds, 0.1))
        report.peak_memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report.growth = _resident() - self._memory if self._memory else 0
        report.fds_after = _fds()
        if report.fds_after > report.fds_before:
            raise LeakError(f"{report.fds_before} descriptors before, {report.fds_after} after")
        if report.growth > MAX_GROWTH:
            raise LeakError(f"grown by {report.growth >> 20} MiB after the first {WARM_UP} inputs")
        return report


def has_atheris() -> bool:
    """Whether inputs can be found by what they reach."""
    return importlib.util.find_spec("atheris") is not None


def by_chance(run: Run, crashes: Path, seed: int) -> Report:
    """Inputs are seeds of the target, changed here and there, and plain chance."""
    chance = random.Random(seed)
    corpus = run.target.seeds()
    while not run.over:
        data = _mutated(chance, corpus) if corpus and chance.random() < 0.3 else _made(chance)
        try:
            with _no_hang():
                run.one(data)
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):
                keep(data, crashes)
            raise
    return run.finish()


def by_coverage(run: Run, crashes: Path, corpus: Path, seed: int) -> NoReturn:
    """atheris chooses the inputs; the process ends with it, and `_done` has the last word of success."""
    atheris = importlib.import_module("atheris")
    for folder in (corpus, crashes):
        folder.mkdir(parents=True, exist_ok=True)
    for data in run.target.seeds():
        keep(data, corpus)

    def one(data: bytes) -> None:
        try:
            run.one(data)
            if run.over:
                report = run.finish()
                run.target.close()
                sys.stdout.write(f"{report.as_dict()}\n")
                sys.stdout.flush()
                os._exit(0)
        except BaseException:
            keep(data, crashes)
            raise

    options = [f"-max_len={MAX_INPUT}", f"-timeout={HANG}", f"-artifact_prefix={crashes}/", "-verbosity=0"]
    atheris.Setup([sys.argv[0], str(corpus), *options, f"-seed={seed}", "-close_fd_mask=0"], one)
    atheris.Fuzz()
    sys.exit("the fuzzer ended before it was enough")


def keep(data: bytes, folder: Path) -> Path:
    """Put an input into a file that is named by it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path


def _made(chance: random.Random) -> bytes:
    return chance.randbytes(chance.randrange(1, chance.choice((64, 512, MAX_INPUT))))


def _mutated(chance: random.Random, corpus: list[bytes]) -> bytes:
    data = bytearray(chance.choice(corpus))
    for _ in range(chance.randrange(1, 8)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                data[at : at + 1] = chance.randbytes(1)
            case 1:
                data[at:at] = chance.randbytes(chance.randrange(16))
            case 2:
                del data[at : at + chance.randrange(16)]
            case _:
                data += chance.choice(corpus)
    return bytes(data[:MAX_INPUT])


@contextlib.contextmanager
def _no_hang() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"one input takes more than {HANG} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
