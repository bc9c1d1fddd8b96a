"""Results as JUnit XML, which continuous integration reads."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from junitparser import Failure, JUnitXml, Properties, Property, Skipped, TestCase, TestSuite

from conformance.expectations import Judged, Verdict


def write_junit(path: Path, results: Iterable[Judged], name: str) -> None:
    """A suite for each section, a case for each check. What is not applicable, and what failed as expected,
    is skipped, with its reason. Raises OSError.
    """
    document = JUnitXml(name)
    for section, group in groupby(results, key=lambda judged: judged.result.check.section):
        suite = TestSuite(section)
        for judged in group:
            suite.add_testcase(_case(judged))
        document.add_testsuite(suite)
    document.update_statistics()
    path.write_bytes(document.tostring())


def _case(judged: Judged) -> TestCase:
    check, detail = judged.result.check, _printable(judged.result.detail)
    case = TestCase(check.id, classname=check.section, time=round(judged.result.seconds, 3))
    properties = Properties()
    for key, value in (("statement", check.statement), ("severity", check.severity.value)):
        properties.add_property(Property(key, value))
    case.append(properties)
    match judged.verdict:
        case Verdict.FAILED:
            case.result = [Failure(detail, check.severity.value)]
        case Verdict.SURPRISING:
            case.result = [Failure(f"{judged.verdict.value}: {judged.reason}", "unexpected pass")]
        case Verdict.KNOWN:
            case.result = [Skipped(f"{judged.verdict.value}: {judged.reason}; {detail}")]
        case Verdict.NOT_APPLICABLE:
            case.result = [Skipped(detail)]
    return case


def _printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(char if char.isprintable() else " " for char in text)
