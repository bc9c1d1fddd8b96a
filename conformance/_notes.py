"""What was seen of a client, statement by statement."""

from __future__ import annotations

from collections.abc import Iterable

from conformance.checks import Check, Outcome, Result


class Notes:
    """Statements that were put to the test, and the first breach of each."""

    def __init__(self, checks: Iterable[Check]) -> None:
        self._checks = {check.id: check for check in checks}
        self._kept: dict[str, int] = {}
        self._breaches: dict[str, tuple[str, int]] = {}

    def judge(self, name: str, good: object, expected: str, came: object) -> bool:
        """The statement was put to the test; whether it was kept."""
        assert name in self._checks, name
        if good:
            self._kept[name] = self._kept.get(name, 0) + 1
        else:
            first, times = self._breaches.get(name, (f"expected {expected}; came {came}", 0))
            self._breaches[name] = first, times + 1
        return bool(good)

    def results(self) -> tuple[Result, ...]:
        """A result for each statement; those that were never put to the test are not applicable."""
        return tuple(self._result(check) for check in self._checks.values())

    def _result(self, check: Check) -> Result:
        if check.id in self._breaches:
            first, times = self._breaches[check.id]
            more = f" (and {times - 1} more times)" if times > 1 else ""
            return Result(check, Outcome.FAIL, first + more)
        if check.id in self._kept:
            return Result(check, Outcome.PASS)
        return Result(check, Outcome.NOT_APPLICABLE, "the client did nothing of the kind")
