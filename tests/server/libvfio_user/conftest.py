from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from server.libvfio_user import Library, serve
from tests.peers.libvfio_user import LibvfioUser
from tests.server.raw import RawClient
from tests.server.world import World, world


@pytest.fixture(scope="session")
def library(libvfio_user: LibvfioUser) -> Library:
    return Library(libvfio_user.library)


@pytest.fixture
async def served(tmp_path: Path, library: Library) -> AsyncIterator[World]:
    """A card that the library serves; afterwards no descriptor is left."""
    async with world(tmp_path, by=partial(serve, library=library)) as made:
        yield made


@pytest.fixture
async def client(served: World) -> RawClient:
    """A client of the served card that has agreed on a version."""
    return await served.client()
