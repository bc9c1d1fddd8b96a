"""Which engine a test's cards are served by, and what is left out because libvfio-user cannot do it.

A test that needs what a limit of the library takes away says ``@pytest.mark.needs_no(Limit.X)``, one that
shows the limit ``@pytest.mark.shows(Limit.X)``. Neither is skipped: a skip would say that this host lacks
something.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from server.libvfio_user import Generation, Library, Limit
from tests.peers.libvfio_user import libvfio_user_under_test
from trionic.engines import Engine

_HOME = Path(__file__).parents[1] / "server" / "libvfio_user"


@functools.cache
def generation() -> Generation:
    """That of the library under test; Debian's is known without building it."""
    if "TRIONIC_TEST_LIBVFIO_USER" in os.environ:
        return Library(libvfio_user_under_test().library).generation
    return Generation.V2022


def why_left_out(item: pytest.Item) -> str | None:
    """The limit for which the test does not run; None if it does."""
    if not (item.path.is_relative_to(_HOME) or engine_of(item) is Engine.LIBVFIO_USER):
        return None
    for marker in item.iter_markers("needs_no"):
        for limit in marker.args:
            if generation() in limit.generations:
                return _name(limit)
    for marker in item.iter_markers("shows"):
        for limit in marker.args:
            if generation() not in limit.generations:
                return f"not {_name(limit)}"
    return None


def engine_of(item: pytest.Item) -> Engine | None:
    """The engine that a parametrized test is for."""
    call = getattr(item, "callspec", None)
    return None if call is None else call.params.get("engine")


def _name(limit: Limit) -> str:
    return f"{limit.label} ({generation().value})"
