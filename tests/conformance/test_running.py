"""A run survives every server: one that is not there, that dies, that ends, that is silent."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path

import pytest
import trio

from conformance import (
    SERVER_CHECKS,
    GoneError,
    Listening,
    Outcome,
    Silent,
    Started,
    reach,
    run_checks,
    select,
)
from tests.conformance.served import served_card

PATIENCE_S = 10.0

# Takes a client and does what {deed} says.
SERVER = """
import os, signal, socket
listener = socket.socket(socket.AF_UNIX)
listener.bind({path!r})
listener.listen()
while True:
    client, _ = listener.accept()
    {deed}
"""


def started(path: Path, deed: str, patience: float = PATIENCE_S) -> Started:
    code = SERVER.format(path=str(path), deed=deed)
    return Started(f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}", path, patience)


async def test_nobody_is_told_before_the_checks_begin(tmp_path: Path) -> None:
    with pytest.raises(GoneError, match="No such file"):
        await reach(Listening(tmp_path / "no.sock", PATIENCE_S))
    with pytest.raises(GoneError, match="no-such-program: No such file"):
        await reach(Started("no-such-program", tmp_path / "no.sock", PATIENCE_S))


async def test_a_server_that_says_nothing_is_told_before_the_checks_begin(tmp_path: Path) -> None:
    path = tmp_path / "deaf.sock"
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        with pytest.raises(Silent, match=r"no answer within 0\.01 s"):
            await reach(Listening(path, 0.01))


async def test_a_server_that_is_there_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    async with served_card(path):
        await reach(Listening(path, PATIENCE_S))


async def test_the_rest_is_not_run_when_the_server_is_gone(tmp_path: Path) -> None:
    checks = select(SERVER_CHECKS, ["device-info.*"])
    told: list[str] = []
    results = await run_checks(
        checks, Listening(tmp_path / "no.sock", PATIENCE_S), lambda result: told.append(result.check.id)
    )
    assert told == [check.id for check in checks]
    assert {result.outcome for result in results} == {Outcome.FAIL}
    assert results[0].detail.startswith("nobody is there: ")
    assert {result.detail for result in results[1:]} == {f"not run: the server was gone at {checks[0].id}"}


async def test_a_server_that_dies_is_named_with_its_signal(tmp_path: Path) -> None:
    host = started(tmp_path / "dying.sock", "os.kill(os.getpid(), signal.SIGSEGV)")
    (result,) = await run_checks(select(SERVER_CHECKS, ["device-info.pci"]), host)
    assert result.outcome is Outcome.FAIL
    assert "its death of SIGSEGV" in result.detail


async def test_a_server_that_hangs_costs_one_check_its_time(tmp_path: Path) -> None:
    host = started(
        tmp_path / "deaf.sock", "keep = globals().setdefault('kept', []); keep.append(client)", 0.5
    )
    (result,) = await run_checks(select(SERVER_CHECKS, ["device-info.pci"]), host)
    assert result.outcome is Outcome.FAIL
    assert "no answer within 0.5 s" in result.detail


async def test_a_server_may_end_with_its_client(tmp_path: Path) -> None:
    host = started(tmp_path / "short.sock", "client.recv(4096); os._exit(0)")
    await host.begin()
    try:
        with trio.fail_after(60):
            first = await host.open()
            first.send(b"bye")
            first.close()
            assert await host.ended()
            second = await host.open()
            second.close()
    finally:
        await host.end()
    assert not (tmp_path / "short.sock").exists()


async def test_a_run_that_is_given_up_leaves_no_server(tmp_path: Path) -> None:
    path = tmp_path / "deaf.sock"
    host = started(path, "keep = globals().setdefault('kept', []); keep.append(client)", 60)
    with trio.move_on_after(1) as given_up:
        await run_checks(select(SERVER_CHECKS, ["device-info.pci"]), host)
    assert given_up.cancelled_caught
    assert not path.exists()
    assert host._process is None
