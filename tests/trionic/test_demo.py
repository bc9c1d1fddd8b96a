import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.trionic.command import PATIENCE_S, run, start
from trionic import demonstration, theatre
from trionic.cli._group import INTERRUPTED
from trionic.demonstration import ACTS, Act, DemoError, Done, Stage
from trionic.theatre import FAILED


def test_everything_is_played_counted_and_timed() -> None:
    done = run("demo")
    assert (done.returncode, done.stderr) == (0, "")
    for act in ACTS:
        (line,) = [line for line in done.stdout.splitlines() if line.strip().startswith(act.name)]
        assert " ms " in line
    for word in ("negotiation", "BAR map", "DMA map", "MSI-X", "INTx", "reset"):
        assert any(word in act.name for act in ACTS)


async def _fail(_: Stage) -> Done:
    raise DemoError("the card is on fire")


async def _hang(_: Stage) -> Done:
    import trio

    await trio.sleep_forever()
    raise AssertionError


def test_an_act_that_fails_is_shown_and_told_by_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(theatre, "ACTS", (ACTS[0], Act("burning", _fail), Act("after", ACTS[1].play)))
    assert theatre.run() == FAILED
    told = capsys.readouterr().out
    assert "failed: the card is on fire" in told
    assert "capabilities" in told, "the acts after it are played all the same"
    assert "1 of 4 failed" in told


def test_an_act_that_hangs_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(theatre, "ACTS", (Act("stuck", _hang),))
    monkeypatch.setattr(theatre, "PATIENCE_S", 0.01)
    assert theatre.run() == FAILED
    assert "failed: not done within 0.01 s" in capsys.readouterr().out


async def test_what_an_act_finds_wrong_is_raised() -> None:
    with pytest.raises(DemoError, match="so it is"):
        demonstration._check(False, "so it is")


def test_ctrl_c_ends_it_cleanly_with_its_server() -> None:
    with start("demo") as process:
        while not (children := _servers(process.pid)):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == INTERRUPTED, (output, errors)
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _servers(pid: int) -> list[int]:
    """Children that serve, beside those that trio starts while it is imported."""
    found = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in listing.read_text().split():
                if b"serve" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found
