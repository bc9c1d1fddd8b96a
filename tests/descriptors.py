"""The file descriptors of this process, for tests that none is left behind."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_fds() -> frozenset[str]:
    """Those that are open, and what they are."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:
            continue  # the one that lists the folder
    return frozenset(found)


def settled_fds() -> frozenset[str]:
    """Those that are open and stay so, unless somebody closes them: what to compare `open_fds` with later.

    Cards of earlier tests may lie in cycles, with descriptors that go when the collector comes by: not in the
    middle of a test that counts. What such a test itself leaves in a cycle counts as left behind.
    """
    gc.collect()
    return open_fds()


@contextmanager
def no_fd_leaks() -> Iterator[None]:
    """Fails if there are descriptors afterwards that were not there before."""
    before = settled_fds()
    yield
    assert open_fds() <= before
