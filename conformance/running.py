"""Runs the checks of a server one after another, each against a server that was seen alive before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import trio

from conformance._server import Server
from conformance.checks import Check, Failed, GoneError, NotApplicable, Outcome, Result, Run, Silent
from conformance.hosts import Host

LONGEST_WAITS: Final = 20
"""A check may wait so many times as long as one answer may take: the longest asks for a few dozen things of
which a broken server answers none.
"""


async def reach(host: Host) -> None:
    """Make sure that somebody answers at all, before hundreds of checks find out that nobody does.

    Raises `GoneError` or `Silent`, one line each.
    """
    await host.begin()
    try:
        async with Server(host).session():
            pass
    except Failed as failure:
        if isinstance(failure, Silent):
            raise
    finally:
        await host.end()


async def run_checks(
    checks: Iterable[Check], host: Host, told: Callable[[Result], None] = lambda result: None
) -> tuple[Result, ...]:
    """Run the server's checks in their order; `told` hears of each result at once.

    Never raises because of what the server does. When nobody listens any more, what is left fails unrun.
    """
    results: list[Result] = []
    gone = ""
    for check in checks:
        if check.run is None:
            continue
        result = await _run(check, host) if not gone else Result(check, Outcome.FAIL, gone)
        if not gone and result.detail.startswith(_GONE):
            gone = f"not run: the server was gone at {check.id}"
        results.append(result)
        told(result)
    return tuple(results)


_GONE: Final = "nobody is there: "


async def _run(check: Check, host: Host) -> Result:
    assert check.run is not None
    begun = trio.current_time()
    try:
        outcome, detail = await _told(check.run, host)
        if not detail.startswith(_GONE):
            after, aftermath = await _told(_next_client, host, fresh=False)
            if after is Outcome.FAIL:
                outcome, detail = after, f"{detail}; {aftermath}" if detail else aftermath
    finally:
        with trio.CancelScope(shield=True):
            await host.end()
    return Result(check, outcome, detail, trio.current_time() - begun)


async def _next_client(server: Server) -> None:
    await server.serves_on("this check")


async def _told(run: Run, host: Host, *, fresh: bool = True) -> tuple[Outcome, str]:
    """How it ended and why."""
    longest = LONGEST_WAITS * host.patience
    try:
        with trio.fail_after(longest):
            if fresh:
                await host.begin()
            await run(Server(host))
    except NotApplicable as reason:
        return Outcome.NOT_APPLICABLE, str(reason)
    except Failed as failure:
        return Outcome.FAIL, str(failure)
    except GoneError as error:
        return Outcome.FAIL, f"{_GONE}{error}"
    except trio.TooSlowError:
        return Outcome.FAIL, f"not done within {longest:g} s"
    except BaseExceptionGroup as group:
        failures, rest = group.split(Failed)
        if failures is None or rest is not None:
            raise
        return Outcome.FAIL, str(_first(failures))
    return Outcome.PASS, ""


def _first(group: BaseExceptionGroup[Failed]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
