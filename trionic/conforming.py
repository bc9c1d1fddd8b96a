"""Conformance for people: each section's failures as they come, and what they amount to in the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from conformance import Check, Judged, Result, Verdict, judge

__all__ = ["Report", "list_checks"]

_MARKS: Final = {
    Verdict.PASSED: ("green", "✓"),
    Verdict.FAILED: ("bold red", "✗"),
    Verdict.KNOWN: ("yellow", "✗"),
    Verdict.SURPRISING: ("bold red", "!"),
    Verdict.NOT_APPLICABLE: ("dim", "-"),
}

_TOLD: Final = (Verdict.FAILED, Verdict.SURPRISING, Verdict.KNOWN)


class Report:
    """Takes results as they come and prints a section when the next one begins; `verbose` shows them all."""

    def __init__(self, console: Console, expected: dict[str, str], *, verbose: bool) -> None:
        self.results: list[Judged] = []
        self._console = console
        self._expected = expected
        self._verbose = verbose
        self._section: list[Judged] = []

    def told(self, result: Result) -> None:
        """A result came."""
        judged = judge(result, self._expected)
        if self._section and self._section[0].result.check.section != result.check.section:
            self._print_section()
        self._section.append(judged)
        self.results.append(judged)

    def end(self, subject: str) -> bool:
        """Print the last section and the sum; whether all is as it should be."""
        self._print_section()
        counts = Counter(judged.verdict for judged in self.results)
        told = ", ".join(
            f"[{_MARKS[verdict][0]}]{counts[verdict]} {verdict.value}[/]"
            for verdict in Verdict
            if counts[verdict]
        )
        seconds = sum(judged.result.seconds for judged in self.results)
        spent = f" in {seconds:.1f} s" if seconds else ""
        self._console.print(f"\n{escape(subject)}: {len(self.results)} checks{spent}: {told or 'none'}")
        return all(judged.verdict.good for judged in self.results)

    def _print_section(self) -> None:
        section, self._section = self._section, []
        if not section:
            return
        passed = sum(judged.verdict is Verdict.PASSED for judged in section)
        silent = sum(judged.verdict is Verdict.NOT_APPLICABLE for judged in section)
        applicable = len(section) - silent
        counted = f"{passed}/{applicable}" if applicable else "n/a"
        style = "green" if passed == applicable else "red"
        title = section[0].result.check.section
        self._console.print(f"[{style if applicable else 'dim'}]{counted:>7}[/]  {escape(title)}")
        for judged in section:
            if self._verbose or judged.verdict in _TOLD:
                self._print_check(judged)

    def _print_check(self, judged: Judged) -> None:
        check = judged.result.check
        style, mark = _MARKS[judged.verdict]
        self._console.print(f"         [{style}]{mark} {check.id}[/] [dim]{check.severity.value}[/]")
        if judged.verdict in (Verdict.PASSED,):
            return
        told = [judged.result.detail] if judged.result.detail else []
        if judged.verdict in _TOLD:
            told.insert(0, check.statement)
        if judged.reason:
            told.append(f"{judged.verdict.value}: {judged.reason}")
        for line in told:
            self._console.print(f"           {line}", markup=False, highlight=False)


def list_checks(console: Console, checks: Sequence[Check]) -> None:
    """A table of the checks: id, how binding, statement."""
    for title, section in groupby(checks, key=lambda check: check.section):
        console.print(_listed(title, section))
    console.print(f"{len(checks)} checks")


def _listed(title: str, checks: Iterable[Check]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for check in checks:
        more = " (destructive)" if check.destructive else ""
        table.add_row(check.id, check.severity.value, check.statement + more)
    return table
