"""A card that moves between two contexts of the library."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import client
from client.migration import MigrationControl, migrate
from device.migration.migration import Migration
from protocol.vfio import DeviceState, Feature, RegionIndex
from server.libvfio_user import Library, Limit, serve
from tests.server.world import BAR2_SIZE, Card

pytestmark = pytest.mark.needs_no(Limit.DEVICE_FEATURE)


@asynccontextmanager
async def movable(folder: Path, name: str, library: Library) -> AsyncIterator[tuple[Card, client.Session]]:
    card = Card(name)
    card.function.migration = Migration(card.function)
    path = folder / name
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, [(card.function, path)], library=library))
        async with client.connect(path) as session:
            yield card, session
        nursery.cancel_scope.cancel()
    card.function.close()


async def test_a_card_moves(tmp_path: Path, library: Library) -> None:
    async with (
        movable(tmp_path, "source", library) as (_, source),
        movable(tmp_path, "target", library) as (target_card, target),
    ):
        await source.region_write(RegionIndex.BAR2, 0, bytes(range(256)) * (BAR2_SIZE // 256))
        await source.region_write(RegionIndex.CONFIG, 4, b"\6\0")
        report = await migrate(source, target)
        assert report.bytes_stopcopy > 0
        assert await target.region_read(RegionIndex.BAR2, 0, BAR2_SIZE) == bytes(range(256)) * (
            BAR2_SIZE // 256
        )
        assert target_card.function.bus_master
        assert await MigrationControl(target).state() is DeviceState.RUNNING


async def test_a_stream_of_another_kind_is_refused(tmp_path: Path, library: Library) -> None:
    async with movable(tmp_path, "target", library) as (_, session):
        control = MigrationControl(session)
        await control.set_state(DeviceState.RESUMING)
        with pytest.raises(client.ServerError, match="EINVAL"):
            await control.write_chunk(b"nothing of the kind" * 10)


@pytest.mark.shows(Limit.DMA_LOGGING)
async def test_a_log_of_dirty_pages_is_refused(tmp_path: Path, library: Library) -> None:
    async with movable(tmp_path, "card", library) as (_, session):
        for feature in (Feature.DMA_LOGGING_START, Feature.DMA_LOGGING_STOP, Feature.DMA_LOGGING_REPORT):
            assert not await session.feature_probe(feature)
