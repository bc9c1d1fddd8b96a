"""What a guest's kernel has against the card: what its console says that no test may leave unread."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

KERNEL_ARGS: Final = "loglevel=5"
"""Has the console show warnings and worse, from all of the guest's boots."""

_TROUBLE: Final = re.compile(
    r"\b(WARNING|BUG|Oops|Call Trace|UBSAN|KASAN)\b|cut here|general protection|lockup|stall"
    r"|nobody cared|blocked for more than|transmit queue \d+ timed out|DMAR: .*fault"
    r"|\b(ifcvf|vp[-_]vdpa|(vhost[-_])?vdpa\d*|virtio(_net|_vdpa|_pci|\d+))\b"
)
"""What a kernel says of itself when something is wrong, and the drivers whose warnings are ours to mind."""

_EXPECTED: Final = ("loading out-of-tree module taints kernel", "module verification failed")


def _entries(console: str) -> Iterator[str]:
    """Lines, but all those of one trace together."""
    trace: list[str] = []
    for line in console.splitlines():
        if trace or "[ cut here ]" in line:
            trace.append(line)
            if "---[ end trace" in line:
                yield "\n".join(trace)
                trace = []
        else:
            yield line
    if trace:
        yield "\n".join(trace)


def complaints(console: str, expected: Sequence[str] = ()) -> list[str]:
    """The lines and traces of a console with `KERNEL_ARGS` that tell of trouble, but those that contain one
    of `expected`.
    """
    allowed = (*_EXPECTED, *expected)
    return [
        entry
        for entry in _entries(console)
        if _TROUBLE.search(entry) and not any(words in entry for words in allowed)
    ]
