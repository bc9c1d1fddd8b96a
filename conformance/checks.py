"""What a check is: a statement of the vfio-user specification, whom it binds, and how to find out whether it
holds.

A module per section of the specification declares its checks:

    section = Section("dma-map", "VFIO_USER_DMA_MAP")

    @section.check(MUST)
    async def overlap(server: Server) -> None:
        '''A window over one that is there already is refused with EEXIST.'''

The check's id is the section's and the function's name (`dma-map.overlap`), its statement the function's
text. It passes by returning; `Failed` and `NotApplicable` tell the other outcomes.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from conformance._server import Server

SPECIFICATION: Final = "vfio-user (QEMU docs/interop/vfio-user.rst), protocol version 0"


class Binds(Enum):
    """Whose duty a statement is."""

    SERVER = "server"
    CLIENT = "client"


class Severity(Enum):
    """How binding a statement is."""

    MUST = "must"
    """The specification says so: a peer may rely on it."""
    SHOULD = "should"
    """The specification advises it, or leaves no other sensible reading ("validate input")."""
    EXTENSION = "extension"
    """The text is silent: what the kernel's VFIO or all known peers do, and so what others expect."""


MUST: Final = Severity.MUST
SHOULD: Final = Severity.SHOULD
EXTENSION: Final = Severity.EXTENSION


class Outcome(Enum):
    """How a check ended."""

    PASS = "pass"
    FAIL = "fail"
    NOT_APPLICABLE = "n/a"


class Failed(Exception):  # noqa: N818
    """The statement does not hold: what was expected, and what came instead."""

    def __init__(self, expected: str, came: str) -> None:
        super().__init__(f"expected {expected}; came {came}")
        self.expected = expected
        self.came = came


class Silent(Failed):
    """Nothing came at all, in the time that there was."""


class NotApplicable(Exception):  # noqa: N818
    """The statement says nothing about this peer, and why."""


class GoneError(Exception):
    """Nobody listens at the server's socket any more: no check can say anything."""


def expect(condition: object, expected: str, came: object) -> None:
    """Go on only if the condition holds; raises `Failed`."""
    if not condition:
        raise Failed(expected, str(came))


Run = Callable[["Server"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """A statement and how it is found out. `run` is None where the watching server observes it
    (`conformance.watching`); a `destructive` check moves the device's state and is run only when allowed.
    """

    id: str
    section: str
    statement: str
    severity: Severity
    binds: Binds
    destructive: bool = False
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """How a check ended, why, and in how many seconds."""

    check: Check
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the specification, by the prefix of its checks' ids and its heading there."""

    prefix: str
    title: str
    checks: list[Check] = field(default_factory=list)

    def check(self, severity: Severity, *, destructive: bool = False) -> Callable[[Run], Run]:
        """Declare a check of the server; see the module's text."""

        def declare(run: Run) -> Run:
            name = getattr(run, "__name__", "").strip("_").replace("_", "-")
            self._add(name, inspect.getdoc(run) or "", severity, Binds.SERVER, destructive, run)
            return run

        return declare

    def observe(self, name: str, severity: Severity, statement: str) -> None:
        """Declare a statement about clients, which the watching server observes."""
        self._add(name, statement, severity, Binds.CLIENT, False, None)

    def _add(
        self, name: str, text: str, severity: Severity, binds: Binds, destructive: bool, run: Run | None
    ) -> None:
        statement = " ".join(text.split())
        if not statement:
            raise TypeError(f"{self.prefix}.{name} does not say what it checks")
        check = Check(f"{self.prefix}.{name}", self.title, statement, severity, binds, destructive, run)
        if any(other.id == check.id for other in self.checks):
            raise TypeError(f"{check.id} is declared twice")
        self.checks.append(check)


def select(
    checks: Iterable[Check],
    only: Iterable[str] = (),
    *,
    severities: Iterable[Severity] = tuple(Severity),
    destructive: bool = True,
) -> tuple[Check, ...]:
    """Those whose id matches one of the globs `only` (none: all of them) and that the rest lets through."""
    globs, allowed = tuple(only), frozenset(severities)
    return tuple(
        check
        for check in checks
        if (not globs or any(fnmatchcase(check.id, glob) for glob in globs))
        and check.severity in allowed
        and (destructive or not check.destructive)
    )
