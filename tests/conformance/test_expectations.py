from pathlib import Path

import pytest

from conformance import SERVER_CHECKS, ExpectationError, Outcome, Result, Verdict, judge, read_expectations

KNOWN = {"dma-map.overlap", "version.first"}
CHECK = SERVER_CHECKS[0]


def test_tables_and_quoted_names_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "known.toml"
    path.write_text('"version.first" = "old"\n[dma-map]\noverlap = "EINVAL"\n', "utf-8")
    assert read_expectations(path, KNOWN) == {"version.first": "old", "dma-map.overlap": "EINVAL"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[dma-map", "Expected ']'"),
        ('[dma-map]\noverlay = "x"', "there is no check 'dma-map.overlay'"),
        ('[dma-map]\noverlap = " "', "dma-map.overlap has no reason"),
        ("[dma-map]\noverlap = 1", "dma-map.overlap has no reason"),
    ],
)
def test_a_file_that_tells_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "known.toml"
    path.write_text(text, "utf-8")
    with pytest.raises(ExpectationError, match=said):
        read_expectations(path, KNOWN)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpectationError, match="No such file"):
        read_expectations(tmp_path / "known.toml", KNOWN)
    (tmp_path / "latin.toml").write_bytes(b"\xff")
    with pytest.raises(ExpectationError, match="utf-8"):
        read_expectations(tmp_path / "latin.toml", KNOWN)


@pytest.mark.parametrize(
    ("outcome", "expected", "verdict"),
    [
        (Outcome.PASS, {}, Verdict.PASSED),
        (Outcome.FAIL, {}, Verdict.FAILED),
        (Outcome.FAIL, {CHECK.id: "known"}, Verdict.KNOWN),
        (Outcome.PASS, {CHECK.id: "known"}, Verdict.SURPRISING),
        (Outcome.NOT_APPLICABLE, {CHECK.id: "known"}, Verdict.NOT_APPLICABLE),
    ],
)
def test_a_result_is_judged_by_what_was_expected(
    outcome: Outcome, expected: dict[str, str], verdict: Verdict
) -> None:
    judged = judge(Result(CHECK, outcome), expected)
    assert judged.verdict is verdict
    assert verdict.good == (verdict not in (Verdict.FAILED, Verdict.SURPRISING))
