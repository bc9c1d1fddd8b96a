"""Fixtures for vDPA in a guest: each parent in turn."""

from __future__ import annotations

import pytest

from tests.guest.vdpa.parents import PARENTS, Parent


@pytest.fixture(scope="module", params=PARENTS, ids=str)
def parent(request: pytest.FixtureRequest) -> Parent:
    """Each parent in turn."""
    found: Parent = request.param
    return found
