"""The checks against our cards behind the real libvfio-user: what fails there is the library's, and known."""

from __future__ import annotations

from pathlib import Path

from conformance import SERVER_CHECKS, Listening, Outcome, Verdict, judge, read_expectations, run_checks
from tests.conftest import cannot
from tests.peers.cache import PeerError
from tests.peers.libvfio_user import libvfio_user
from tests.trionic.command import serving

PATIENCE_S = 2.0


async def test_a_card_behind_libvfio_user_fails_where_the_library_does(tmp_path: Path) -> None:
    try:
        library = libvfio_user().library
    except PeerError as error:
        cannot(f"libvfio-user cannot be had here: {error}")
    path = tmp_path / "card.sock"
    known = {check.id for check in SERVER_CHECKS}
    expected = read_expectations(Path(__file__).parent / "engine-2022.toml", known)
    with serving("--engine", "libvfio-user", "--libvfio-user", library, "--socket", path):
        results = await run_checks(SERVER_CHECKS, Listening(path, PATIENCE_S))
    judged = [judge(result, expected) for result in results]
    assert [(each.result.check.id, each.result.detail) for each in judged if not each.verdict.good] == []
    assert {each.result.check.id for each in judged if each.verdict is Verdict.KNOWN} == set(expected)
    assert sum(result.outcome is Outcome.PASS for result in results) > 180
