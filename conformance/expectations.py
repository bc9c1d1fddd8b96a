"""Which failures are known: a TOML file of check ids, each with its reason.

    [dma-map]
    overlap = "EINVAL instead of EEXIST"

A failure that is expected is no failure of the run; a check that was expected to fail and passes is.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from conformance.checks import Outcome, Result


class ExpectationError(ValueError):
    """A file that does not tell what is expected; one line."""


class Verdict(Enum):
    """What a result means for the run."""

    PASSED = "passed"
    FAILED = "failed"
    KNOWN = "failed as expected"
    SURPRISING = "passed, though its failure was expected"
    NOT_APPLICABLE = "not applicable"

    @property
    def good(self) -> bool:
        """The run may succeed."""
        return self not in (Verdict.FAILED, Verdict.SURPRISING)


@dataclass(frozen=True, slots=True)
class Judged:
    """A result and what it means; `reason` is why a failure was expected."""

    result: Result
    verdict: Verdict
    reason: str = ""


def read_expectations(path: Path, known: Collection[str]) -> dict[str, str]:
    """Check id to reason; raises `ExpectationError` for a file that cannot be read, is no TOML, names a check
    that is not `known`, or has no reason.
    """
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeError) as error:
        raise ExpectationError(f"{path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ExpectationError(f"{path}: {error}") from None
    found = dict(_flat(document))
    for name, reason in found.items():
        if name not in known:
            raise ExpectationError(f"{path}: there is no check {name!r}")
        if not isinstance(reason, str) or not reason.strip():
            raise ExpectationError(f"{path}: {name} has no reason")
    return found


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def judge(result: Result, expected: Mapping[str, str]) -> Judged:
    """What a result means."""
    reason = expected.get(result.check.id, "")
    match result.outcome:
        case Outcome.NOT_APPLICABLE:
            return Judged(result, Verdict.NOT_APPLICABLE)
        case Outcome.PASS:
            return Judged(result, Verdict.SURPRISING if reason else Verdict.PASSED, reason)
        case Outcome.FAIL:
            return Judged(result, Verdict.KNOWN if reason else Verdict.FAILED, reason)
