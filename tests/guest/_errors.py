"""The ways in which the rig says no."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.peers.cache import PeerError

if TYPE_CHECKING:
    from tests.guest._machine import GuestResult

_SHOWN = 6000


class RigError(PeerError):
    """The rig cannot be made or used on this host; the message says what is missing and how to get it."""


def _tail(title: str, text: str) -> str:
    text = text.rstrip()
    cut = f"[... {len(text) - _SHOWN} characters before this]\n" if len(text) > _SHOWN else ""
    return f"--- {title} ---\n{cut}{text[-_SHOWN:] or '(nothing)'}"


class GuestError(AssertionError):
    """A guest did not do what it was booted for; the message and `result` carry everything it said."""

    def __init__(self, reason: str, result: GuestResult) -> None:
        self.reason = reason
        self.result = result
        super().__init__(
            "\n".join(
                [
                    reason,
                    _tail("what the script printed", result.output),
                    _tail("console", result.console),
                    _tail("QEMU's stderr", result.qemu_stderr),
                ]
            )
        )
