"""No check is vacuous: a proxy before the native server lies in one way at a time, and the check says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import SERVER_CHECKS, Listening, Outcome, run_checks, select
from tests.conformance.lies import LIES
from tests.conformance.proxy import Honest, proxied
from tests.conformance.seen import SEEN
from tests.conformance.served import served_card
from tests.conformance.test_native import NOT_APPLICABLE

# Short, because some lies are silence; a check that fails for being slow is not counted.
PATIENCE_S = 0.5

# The native server itself shows that these can fail.
FAIL_ANYWAY = {"disconnect.state-is-kept"}


def test_every_check_that_applies_sees_a_lie() -> None:
    seen = {name for names in SEEN.values() for name in names}
    assert seen == {check.id for check in SERVER_CHECKS} - NOT_APPLICABLE - FAIL_ANYWAY
    assert SEEN.keys() == LIES.keys()


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_is_seen(lie: str, tmp_path: Path) -> None:
    server, proxy = tmp_path / "card.sock", tmp_path / "proxy.sock"
    believed = []
    async with served_card(server):
        for check in select(SERVER_CHECKS, SEEN[lie]):
            # Each on its own: some lies leave nothing behind to be checked.
            async with proxied(proxy, server, LIES[lie]()):
                (result,) = await run_checks([check], Listening(proxy, PATIENCE_S))
            if result.outcome is not Outcome.FAIL:
                believed.append((check.id, result.outcome, result.detail))
    assert believed == []


async def test_the_proxy_itself_changes_nothing(tmp_path: Path) -> None:
    server, proxy = tmp_path / "card.sock", tmp_path / "proxy.sock"
    async with served_card(server), proxied(proxy, server, Honest()):
        results = await run_checks(SERVER_CHECKS, Listening(proxy, 10.0))
    failed = {result.check.id for result in results if result.outcome is Outcome.FAIL}
    assert failed == FAIL_ANYWAY
