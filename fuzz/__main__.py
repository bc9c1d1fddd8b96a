"""python -m fuzz [TARGET ...] [--seconds N] [--runs N]: try the targets one after the other, say what came of
it.

Each has a process of its own, so that one that dies does not take the others along; at most one runs at a
time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fuzz._drivers import Run, Target, by_chance, by_coverage, has_atheris

HERE: Final = Path(__file__).parent
CRASHES: Final = HERE / "crashes"
CORPUS: Final = HERE / "corpus"

TARGETS: Final = {
    "session": ("fuzz._session", "Session", 3),
    "engine": ("fuzz._engine", "Engine", 1),
    "rings": ("fuzz._rings", "Rings", 1),
}
"""Where each is, and its share of the time; the slowest comes last, and has what the others leave over."""

INSTRUMENTED: Final = ("protocol", "server", "device", "firmware")


def make(name: str) -> Target:
    """The target of that name."""
    module, kind, _ = TARGETS[name]
    made: Target = getattr(importlib.import_module(module), kind)()
    return made


def main() -> int:
    """The exit status: 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Peers and drivers that lie.")
    parser.add_argument("target", nargs="*", help=f"of {', '.join(TARGETS)}; all of them if none is named")
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (60)")
    parser.add_argument("--runs", type=int, default=1 << 62, help="exchanges for each target (no limit)")
    parser.add_argument("--seed", type=int, default=1, help="where chance begins (1)")
    parser.add_argument("--chance", action="store_true", help="do without atheris")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}")
    if options.alone:
        return _alone(names[0], options)
    failed = [
        name for name, seconds in _shares(names, options.seconds) if _in_a_process(name, options, seconds)
    ]
    for name in failed:
        sys.stdout.write(
            f"{name}: FAILED; the input is in {CRASHES / name}, try it with tests/test_fuzz.py\n"
        )
    return bool(failed)


def _shares(names: Sequence[str], seconds: float) -> Iterator[tuple[str, float]]:
    """Each target with its seconds; what one that is done early leaves over is for those after it."""
    end = time.monotonic() + seconds
    for at, name in enumerate(names):
        rest = sum(TARGETS[other][2] for other in names[at:])
        yield name, max(0.0, end - time.monotonic()) * TARGETS[name][2] / rest


def _in_a_process(name: str, options: argparse.Namespace, seconds: float) -> int:
    command = [sys.executable, "-m", "fuzz", name, "--alone", "--seconds", str(seconds)]
    command += ["--runs", str(options.runs), "--seed", str(options.seed)]
    if options.chance:
        command.append("--chance")
    return subprocess.run(command, check=False).returncode


def _alone(name: str, options: argparse.Namespace) -> int:
    logging.getLogger().addHandler(logging.NullHandler())
    limits = {"seconds": options.seconds, "exchanges": options.runs}
    if has_atheris() and not options.chance:
        atheris = importlib.import_module("atheris")
        with atheris.instrument_imports(include=list(INSTRUMENTED)):
            target = make(name)
        by_coverage(Run(target, "atheris", **limits), CRASHES / name, CORPUS / name, options.seed)
    target = make(name)
    with contextlib.closing(target):
        report = by_chance(Run(target, "chance", **limits), CRASHES / name, options.seed)
    sys.stdout.write(f"{report.as_dict()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
