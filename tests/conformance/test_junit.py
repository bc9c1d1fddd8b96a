from pathlib import Path
from xml.etree import ElementTree

from conformance import SERVER_CHECKS, Outcome, Result, judge, write_junit


def test_every_verdict_is_told_to_continuous_integration(tmp_path: Path) -> None:
    first, second, third, fourth, fifth = SERVER_CHECKS[:5]
    known = {third.id: "old", fourth.id: "old"}
    results = [
        judge(Result(first, Outcome.PASS, seconds=0.25), known),
        judge(Result(second, Outcome.FAIL, "expected <1>; came \0"), known),
        judge(Result(third, Outcome.FAIL, "as ever"), known),
        judge(Result(fourth, Outcome.PASS), known),
        judge(Result(fifth, Outcome.NOT_APPLICABLE, "nothing there"), known),
    ]
    path = tmp_path / "report.xml"
    write_junit(path, results, "card.sock")
    root = ElementTree.parse(path).getroot()
    assert root.attrib["name"] == "card.sock"
    assert (root.attrib["tests"], root.attrib["failures"], root.attrib["skipped"]) == ("5", "2", "2")
    (suite,) = root
    assert suite.attrib["name"] == first.section
    cases = {case.attrib["name"]: case for case in suite.iter("testcase")}
    assert cases[first.id].attrib["time"] == "0.25"
    statements = [each.attrib["value"] for each in cases[first.id].iter("property")]
    assert statements == [first.statement, "must"]
    messages = [
        [child.attrib["message"] for child in case if child.tag in ("failure", "skipped")]
        for case in cases.values()
    ]
    assert messages == [
        [],
        ["expected <1>; came  "],
        ["failed as expected: old; as ever"],
        ["passed, though its failure was expected: old"],
        ["nothing there"],
    ]
