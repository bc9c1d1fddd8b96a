"""The examples, run as a reader would run them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trionic.command import serving

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("echo.py", "100 frames out and back\n"),
        ("adder.py", "the sum of 10 numbers is 55\n"),
        ("irqchips.py", "1000 frames out and back, 10 changes of the irqchip\n"),
        (
            "peers.py",
            "100 frames out and back\n"
            "the memory of the driver's queues was taken away\n"
            "100 frames out and back\n",
        ),
    ],
)
def test_an_example_does_what_it_says(name: str, said: str) -> None:
    assert run(name) == said


def test_the_identity_of_a_served_card_is_read(tmp_path: Path) -> None:
    with serving("--socket", tmp_path / "card.sock"):
        assert run("ids.py", str(tmp_path / "card.sock")) == "1af4:1041\n"


def test_every_example_is_run_here() -> None:
    run_here = {"ids.py", "echo.py", "adder.py", "irqchips.py", "peers.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == run_here
