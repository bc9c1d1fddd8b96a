"""The fuzz targets: what they found once stays found, and a slice of `make fuzz` runs with the tests."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fuzz.__main__ import CRASHES, TARGETS, make
from fuzz._choices import Choices
from fuzz._drivers import LeakError, Run, Target, by_chance, has_atheris

SLICE_S = 60
FOUND = Path(__file__).parent / "found"
"""Inputs that once did harm, in a folder for each target; what `fuzz` has just found is tried as well."""

INPUTS = sorted(path for folder in (FOUND, CRASHES) for path in folder.glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    made: dict[str, Target] = {}
    yield made
    for target in made.values():
        target.close()


@pytest.mark.parametrize("path", INPUTS, ids=[f"{path.parent.name}-{path.name}" for path in INPUTS])
def test_what_did_harm_once_does_none_any_more(path: Path, targets: dict[str, Target]) -> None:
    name = path.parent.name
    if name not in targets:
        targets[name] = make(name)
    targets[name].run(path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_of_a_target_runs(name: str, targets: dict[str, Target]) -> None:
    if name not in targets:
        targets[name] = make(name)
    for seed in targets[name].seeds():
        targets[name].run(seed)
    assert targets[name].exchanges


def test_a_slice_of_the_nightly_run_finds_nothing() -> None:
    command = [sys.executable, "-m", "fuzz", "--seconds", str(SLICE_S)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * SLICE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    reports = [ast.literal_eval(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [report["target"] for report in reports] == list(TARGETS)
    for report in reports:
        assert report["driver"] == ("atheris" if has_atheris() else "chance")
        assert report["exchanges"] > 0
        assert report["fds_after"] <= report["fds_before"]
        print(report)  # noqa: T201 - the figures of this machine, shown with -rP


class Broken:
    """A target in which one byte is a mistake, and which may lose descriptors."""

    name = "broken"
    exchanges = 0

    def __init__(self, *, leaks: bool = False) -> None:
        self._leaks = leaks
        self.held: list[int] = []

    def run(self, data: bytes) -> None:
        self.exchanges += 1
        if self._leaks:
            self.held.append(os.open("/dev/null", os.O_RDONLY))
        elif b"!" in data:
            raise ValueError("a mistake")

    def seeds(self) -> list[bytes]:
        return [b"harmless"]

    def close(self) -> None:
        for one in self.held:
            os.close(one)


def test_chance_finds_a_mistake_and_keeps_the_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mistake"):
        by_chance(Run(Broken(), "chance", seconds=30, exchanges=10_000), tmp_path, 1)
    (kept,) = tmp_path.iterdir()
    assert b"!" in kept.read_bytes()


def test_descriptors_that_are_missing_at_the_end_are_told(tmp_path: Path) -> None:
    with closing(Broken(leaks=True)) as target, pytest.raises(LeakError, match="descriptors"):
        by_chance(Run(target, "chance", seconds=30, exchanges=3), tmp_path, 1)


def test_choices_never_run_out_and_stay_in_bounds() -> None:
    choices = Choices(random.Random(1).randbytes(300))
    while choices.left:
        assert 0 <= choices.below(10) < 10
        assert choices.pick((1, 2, 3)) in (1, 2, 3)
        assert 0 <= choices.number(16) < 1 << 16
    assert choices.bytes(5) == b""
    assert (choices.below(7), choices.pick("abc"), choices.number(64)) == (0, "a", 0)
