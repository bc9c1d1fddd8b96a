import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from trionic import guest_shell
from trionic.errors import TrionicError

RIG = """
import json, pathlib, sys
pathlib.Path("called").write_text(json.dumps(
    [sys.argv[1:], [pathlib.Path(arg).is_socket() for arg in sys.argv if arg.endswith(".sock")]]))
raise SystemExit(7)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose rig tells how it was called."""
    rig = tmp_path / "checkout" / "tests" / "guest"
    rig.mkdir(parents=True)
    (rig / "__main__.py").write_text(RIG)
    (rig / "__init__.py").touch()
    (rig.parent / "__init__.py").touch()
    monkeypatch.setattr(guest_shell, "_CHECKOUT", tmp_path / "checkout")
    return tmp_path / "checkout"


def called(checkout: Path) -> list[list[object]]:
    told: list[list[object]] = json.loads((checkout / "called").read_text())
    return told


def test_an_installation_without_the_rig_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_shell, "_CHECKOUT", tmp_path)
    with pytest.raises(TrionicError, match="run `make guest` in a checkout"):
        guest_shell.run([], None, [])


def test_a_guest_gets_the_cards_that_are_served(checkout: Path, tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.fspath(path))
        assert guest_shell.run([path], None, ["--smp", "4"]) == 7
    assert called(checkout) == [["shell", "--socket", str(path), "--smp", "4"], [True]]


def test_a_guest_gets_a_card_of_its_own(checkout: Path) -> None:
    assert guest_shell.run([], "loopback", []) == 7
    (_, option, path), there = called(checkout)
    assert (option, there) == ("--socket", [True])
    assert not Path(str(path)).parent.exists(), "all is tidied up afterwards"


def test_without_passt_the_guest_is_told_that_it_is_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert guest_shell.run([], None, []) == 7
    assert "passt is not installed" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed")
def test_with_passt_the_guest_has_this_machines_network(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guest_shell.run([], None, []) == 7
    assert "udhcpc" in capsys.readouterr().out


def test_a_card_that_is_not_served_is_missed(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(TrionicError, match=r"no socket; start `trionic serve --socket"):
        guest_shell.run([tmp_path / "card.sock"], None, [])


def test_a_port_is_for_the_guests_own_card(checkout: Path, tmp_path: Path) -> None:
    with pytest.raises(TrionicError, match="--port is for the guest's own card"):
        guest_shell.run([tmp_path / "card.sock"], "loopback", [])


def test_what_does_not_start_is_told_with_its_last_words(checkout: Path) -> None:
    with pytest.raises(TrionicError, match=r"does not start: trionic: .*warp"):
        guest_shell.run([], "warp:speed=9", [])
