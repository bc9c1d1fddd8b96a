"""The legal order of things on one connection.

Rule 1: everything that depends on what happened before is a row of `TRANSITIONS`; a pair without a row is
illegal. Rule 2: the table does not know which role it plays: a client sends VERSION where a server receives
it. Which side may send which command at all is not a matter of order and stands in `commands.py`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class State(IntEnum):
    """Where a connection stands."""

    START = 0
    """Nothing was said; only VERSION may be."""
    OFFERED = 1
    """We proposed a version and wait for the answer."""
    READY = 2
    """Agreed; commands and replies flow both ways."""
    BROKEN = 3
    """The peer broke the protocol or refused us; nothing may be read, and nothing sent but answers to what it
    asked before.
    """
    CLOSED = 4
    """We closed."""


class Step(IntEnum):
    """What can happen."""

    SEND_VERSION = 0
    RECEIVE_VERSION = 1
    RECEIVE_AGREEMENT = 2
    SEND_COMMAND = 3
    RECEIVE_COMMAND = 4
    SEND_REPLY = 5
    RECEIVE_REPLY = 6
    BREAK = 7
    CLOSE = 8


TRANSITIONS: Final[dict[tuple[State, Step], State]] = {
    # the client's way to READY
    (State.START, Step.SEND_VERSION): State.OFFERED,
    (State.OFFERED, Step.RECEIVE_AGREEMENT): State.READY,
    # the server's: it answers within the same step
    (State.START, Step.RECEIVE_VERSION): State.READY,
    # a session
    (State.READY, Step.SEND_COMMAND): State.READY,
    (State.READY, Step.RECEIVE_COMMAND): State.READY,
    (State.READY, Step.SEND_REPLY): State.READY,
    (State.READY, Step.RECEIVE_REPLY): State.READY,
    # the end
    (State.START, Step.BREAK): State.BROKEN,
    (State.OFFERED, Step.BREAK): State.BROKEN,
    (State.READY, Step.BREAK): State.BROKEN,
    (State.START, Step.CLOSE): State.CLOSED,
    (State.OFFERED, Step.CLOSE): State.CLOSED,
    (State.READY, Step.CLOSE): State.CLOSED,
    (State.BROKEN, Step.SEND_REPLY): State.BROKEN,
    (State.BROKEN, Step.CLOSE): State.CLOSED,
    (State.CLOSED, Step.CLOSE): State.CLOSED,
}
