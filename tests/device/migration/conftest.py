"""A function to move from, and one to move to."""

from collections.abc import Iterator

import pytest

from tests.device.migration.rig import Rig, rigs


@pytest.fixture
def source() -> Iterator[Rig]:
    with rigs(Rig()) as (rig,):
        yield rig


@pytest.fixture
def target() -> Iterator[Rig]:
    with rigs(Rig()) as (rig,):
        yield rig
