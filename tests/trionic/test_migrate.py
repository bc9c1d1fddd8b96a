import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio

import client
import client.virtio._attachment
from tests.trionic.command import refusal, run, serving
from trionic import _traffic, migrating
from trionic.errors import TrionicError
from trionic.migrating import Journey, move, text, travel

Pair = tuple[Path, Path]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Two servers, each in a process of its own, with a card on a loopback port."""
    with ExitStack() as stack:
        sockets = tmp_path / "a.sock", tmp_path / "b.sock"
        for socket in sockets:
            stack.enter_context(serving("--socket", socket))
        yield sockets


def test_a_hundred_round_trips_lose_and_double_no_frame(pair: Pair) -> None:
    done = run("migrate", *pair, "--rounds", "100", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert len(told["moves"]) == 200
    assert (told["lost"], told["doubled"], told["overtaken"]) == (0, 0, 0)
    assert told["sent"] == told["received"] >= 200
    for report in told["moves"]:
        assert report["downtime_seconds"] > 0
        assert report["bytes_precopy"] > told["memory"] > report["bytes_stopcopy"], "memory went ahead"


@pytest.mark.parametrize("options", [("--intx",), ("--no-precopy",)], ids=["intx", "no-precopy"])
def test_it_moves_with_intx_and_without_precopy(pair: Pair, options: tuple[str, ...]) -> None:
    done = run("migrate", *pair, "--rounds", "3", *options)
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("lost       0", "doubled    0", "overtaken  0"):
        assert line in done.stdout.splitlines()


def test_the_servers_are_as_good_as_before(pair: Pair) -> None:
    for sockets in (pair, pair[::-1]):
        assert run("migrate", *sockets, "--rounds", "1").returncode == 0


def test_cards_of_another_kind_are_refused_before_anything_stops(tmp_path: Path) -> None:
    small, large = tmp_path / "small.sock", tmp_path / "large.sock"
    with serving("--socket", small, "--bar2-size", "1M"), serving("--socket", large, "--bar2-size", "2M"):
        told = refusal("migrate", small, large)
        assert "the device was not moved (copying the running device)" in told
        assert "EINVAL" in told


def test_nobody_at_the_other_end_is_told(tmp_path: Path) -> None:
    card = tmp_path / "card.sock"
    with serving("--socket", card):
        assert f"cannot connect to {tmp_path / 'none'}" in refusal("migrate", card, tmp_path / "none")


def test_a_card_does_not_move_to_itself(tmp_path: Path) -> None:
    assert "are the same server" in refusal("migrate", tmp_path / "x", tmp_path / "." / "x")


def test_a_card_that_sends_nothing_back_cannot_be_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_traffic, "GRACE_S", 0.05)
    first, second = tmp_path / "a.sock", tmp_path / "b.sock"
    with (
        serving("--socket", first, "--port", f"pcap:write={tmp_path / 'out.pcap'}"),
        serving("--socket", second),
        pytest.raises(TrionicError, match="no frame comes back"),
    ):
        move(first, second, 1)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little patience with a server that does not answer."""
    monkeypatch.setattr(migrating, "PATIENCE_S", 0.5)
    for module, name in (
        (client.migration, "UNDO_TIMEOUT"),
        (client.dma, "UNMAP_TIMEOUT"),
        (client.interrupts, "DISABLE_TIMEOUT"),
        (client.virtio._attachment, "STOP_TIMEOUT"),
    ):
        monkeypatch.setattr(module, name, 0.1)


@pytest.mark.usefixtures("hasty")
def test_a_server_that_stops_answering_is_told(tmp_path: Path) -> None:
    first, second = tmp_path / "a.sock", tmp_path / "b.sock"
    with serving("--socket", first), serving("--socket", second) as stopped:

        def stop(done: int) -> None:
            stopped.process.send_signal(signal.SIGSTOP)

        with pytest.raises(TrionicError, match=r"not done within 0\.5 s|not moved") as told:
            move(first, second, 10, progress=stop)
        assert "\n" not in str(told.value)


def test_a_server_that_dies_is_one_error_and_no_group(pair: Pair, tmp_path: Path) -> None:
    third = tmp_path / "c.sock"
    with serving("--socket", third) as dying:

        def kill(done: int) -> None:
            dying.process.kill()
            dying.process.wait()

        with pytest.raises(client.ClientError, match="server"):
            trio.run(partial(travel, pair[0], third, 10, progress=kill))


def test_ctrl_c_is_no_group(pair: Pair) -> None:
    with pytest.raises(KeyboardInterrupt):
        move(*pair, 10, progress=lambda done: signal.raise_signal(signal.SIGINT))


def test_a_path_that_leads_in_a_circle_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to(tmp_path / "x")
    assert "Too many levels of symbolic links" in refusal("migrate", tmp_path / "x", tmp_path / "y")


def test_a_frame_too_few_or_too_many_is_not_sound() -> None:
    assert Journey(sent=3, received=3).sound
    lost = Journey(sent=3, received=2)
    assert (lost.lost, lost.sound) == (1, False)
    doubled = Journey(sent=3, received=4, doubled=1)
    assert (doubled.lost, doubled.sound) == (0, False)
    assert not Journey(sent=3, received=3, overtaken=1).sound
    hidden = Journey(sent=3, received=3, doubled=1)
    assert hidden.lost == 1, "a doubled one does not make up for a lost one"


def test_what_is_told_is_for_people(pair: Pair) -> None:
    told = text(move(*pair, 1))
    assert [line.split()[0] for line in told.splitlines()] == [
        *("moves", "frames", "lost", "doubled", "overtaken", "memory", "downtime", "state")
    ]
