"""The checks against the native server: whatever fails there is a difference on purpose, or ours to mend."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import SERVER_CHECKS, Listening, Outcome, Verdict, judge, read_expectations, run_checks
from device.revocation import Revocation
from tests.conformance.served import served_card

PATIENCE_S = 5.0

# Nothing of what a card has makes these statements say anything of it.
NOT_APPLICABLE = {
    "dma-map.one-too-many",
    "migration.without-pre-copy",
    "region-info.device-specific",
    "region-info.little-room",
    "region-info.sparse-areas",
    "region-read.unreadable-region",
    "reset.not-announced",
    "write-multi.not-negotiated",
}


@pytest.mark.parametrize("revocation", Revocation)
async def test_the_native_server_keeps_every_statement_but_those_it_differs_from(
    revocation: Revocation, tmp_path: Path
) -> None:
    path = tmp_path / "card.sock"
    known = {check.id for check in SERVER_CHECKS}
    expected = read_expectations(Path(__file__).parent / "native.toml", known)
    async with served_card(path, revocation=revocation):
        results = await run_checks(SERVER_CHECKS, Listening(path, PATIENCE_S))
    judged = [judge(result, expected) for result in results]
    assert [(each.result.check.id, each.result.detail) for each in judged if not each.verdict.good] == []
    assert {each.result.check.id for each in judged if each.verdict is Verdict.KNOWN} == set(expected)
    silent = {result.check.id for result in results if result.outcome is Outcome.NOT_APPLICABLE}
    assert silent == NOT_APPLICABLE
