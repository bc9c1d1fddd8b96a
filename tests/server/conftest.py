from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.server.raw import RawClient
from tests.server.world import World, world


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[World]:
    """A card that is served; afterwards no descriptor is left."""
    async with world(tmp_path) as made:
        yield made


@pytest.fixture
async def client(served: World) -> RawClient:
    """A client of the served card that has agreed on a version."""
    return await served.client()
