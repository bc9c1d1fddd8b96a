"""The checks against the servers of libvfio-user's authors: what fails there is known, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance import SERVER_CHECKS, Outcome, Started, Verdict, judge, read_expectations, run_checks
from tests.conftest import cannot
from tests.peers.cache import PeerError
from tests.peers.lvu_samples import sample

PATIENCE_S = 2.0

# What only one of the two does, beside samples-2022.toml.
OWN: dict[str, dict[str, str]] = {
    "gpio-pci-idio-16": {},
    "server": {
        "region-info.power-of-two": "its BAR 1 has three pages",
        "region-info.no-more-descriptors-than-allowed": "ENOSPC instead of a description without descriptors",
        "region-read.of-mappable-regions": "its BAR 1 refuses reads of other widths than its own",
    },
}


def program(name: str) -> Path:
    try:
        return sample(name)
    except PeerError as error:
        cannot(f"libvfio-user's samples cannot be had here: {error}")


@pytest.mark.parametrize("name", OWN)
async def test_a_sample_fails_where_it_is_known_to(name: str, tmp_path: Path) -> None:
    known = {check.id for check in SERVER_CHECKS}
    expected = read_expectations(Path(__file__).parent / "samples-2022.toml", known) | OWN[name]
    host = Started(f"{program(name)} {{socket}}", tmp_path / "sample.sock", PATIENCE_S)
    results = await run_checks(SERVER_CHECKS, host)
    judged = [judge(result, expected) for result in results]
    bad = [(each.result.check.id, each.result.detail) for each in judged if not each.verdict.good]
    assert not bad
    assert {each.result.check.id for each in judged if each.verdict is Verdict.KNOWN} == set(expected)
    assert sum(result.outcome is Outcome.PASS for result in results) > 160
