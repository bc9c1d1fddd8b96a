from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import EACCES, EINVAL, ENODEV, ENOMEM
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import client
from client.dmabuf import BarExport, DmaBufError, exported_bar
from client.export_view import ExportView
from client.phys_vec import PhysVec
from device.revocation import Revocation
from tests.client.exporter import (
    BAR,
    MEMORY_OFF,
    MEMORY_ON,
    PAGE,
    SIZE,
    START,
    FakeExporter,
    an_export,
    file,
    session_of,
    switch_memory,
)
from tests.client.peer import FakeRegion
from tests.conformance.served import served_card
from tests.descriptors import open_fds, settled_fds

ONES = b"\xff"


@asynccontextmanager
async def parts(*ranges: tuple[int, int]) -> AsyncIterator[tuple[BarExport, int]]:
    """An export of these parts, and the descriptor of the file, filled with the number of each page."""
    with file() as fd:
        for page in range((START + SIZE) // PAGE):
            os.pwrite(fd, bytes([page]) * PAGE, page * PAGE)
        async with session_of(FakeExporter([fd])) as session, exported_bar(session, BAR, ranges) as export:
            yield export, fd


async def test_a_view_shows_the_ranges_one_after_the_other() -> None:
    async with parts((2 * PAGE, PAGE), (0, 2 * PAGE), (2 * PAGE, PAGE)) as (export, fd):
        with ExportView(export) as imported:
            assert len(imported.view) == 4 * PAGE
            assert bytes(imported.view[::PAGE]) == bytes([4, 2, 3, 4])
            imported.view[0] = 99
            assert imported.view[3 * PAGE] == 99
            assert os.pread(fd, 1, 4 * PAGE) == bytes([99])
            assert export.maps == 1
        assert (export.maps, export.importers) == (0, ())


async def test_a_view_reads_as_ones_while_it_is_revoked_and_has_the_same_data_again() -> None:
    async with an_export() as (export, session, server):
        os.pwrite(server.fds[0], b"the same", START)
        with ExportView(export) as imported:
            view = imported.view[:8]
            assert bytes(view) == b"the same"
            await switch_memory(session, MEMORY_OFF)
            assert (bytes(view), export.maps) == (ONES * 8, 0)
            view[:4] = b"lost"
            with pytest.raises(DmaBufError) as refusal:
                imported.fault()
            assert refusal.value.errno == ENODEV
            await switch_memory(session, MEMORY_ON)
            assert (bytes(view), export.maps) == (b"the same", 1)
            imported.fault()
            assert export.maps == 1
            view.release()
        assert server.maps_seen[-2:] == [0, 0]
        await switch_memory(session, MEMORY_OFF)


async def test_a_view_that_somebody_holds_is_cut_off_all_the_same() -> None:
    async with an_export() as (export, session, server):
        imported = ExportView(export)
        view = imported.view[:4]
        with pytest.raises(BufferError):
            imported.close()
        assert (bytes(view), export.maps, export.importers) == (ONES * 4, 0, ())
        await switch_memory(session, MEMORY_OFF)
        await switch_memory(session, MEMORY_ON)
        view[:4] = b"none"
        assert os.pread(server.fds[0], 4, START) == bytes(4)
        view.release()
        imported.close()
        imported.close()


async def test_a_view_of_what_is_revoked_is_refused() -> None:
    async with an_export() as (export, _, _):
        await export.revoke()
        with pytest.raises(DmaBufError) as refusal:
            ExportView(export)
        assert refusal.value.errno == ENODEV


@pytest.mark.parametrize("offset", [1, PAGE - 1])
async def test_a_bar_that_begins_within_a_page_of_its_file_cannot_be_mapped(offset: int) -> None:
    with file() as fd:
        async with (
            session_of(FakeExporter([fd]), {BAR: FakeRegion(PAGE, offset=offset)}) as session,
            exported_bar(session, BAR) as export,
        ):
            before = settled_fds()
            with pytest.raises(DmaBufError) as refusal:
                ExportView(export)
            assert refusal.value.errno == EINVAL
            assert (export.maps, export.importers) == (0, ())
            assert open_fds() == before


async def test_a_file_that_may_not_be_written_cannot_be_mapped() -> None:
    with file() as fd:
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            async with session_of(FakeExporter([again])) as session, exported_bar(session, BAR) as export:
                with pytest.raises(DmaBufError) as refusal:
                    ExportView(export)
                assert refusal.value.errno == EACCES
                assert export.maps == 0
        finally:
            os.close(again)


async def test_a_view_that_cannot_come_back_holds_nothing() -> None:
    async with an_export() as (export, session, server):
        with ExportView(export) as imported:
            await switch_memory(session, MEMORY_OFF)
            again = os.open(f"/proc/self/fd/{server.fds[0]}", os.O_RDONLY)
            os.dup2(again, export.fd, inheritable=False)
            os.close(again)
            await switch_memory(session, MEMORY_ON)
            assert (export.revoked, export.maps, bytes(imported.view[:4])) == (False, 0, ONES * 4)
            with pytest.raises(DmaBufError) as refusal:
                imported.fault()
            assert (refusal.value.errno, export.maps) == (EACCES, 0)


async def test_more_than_a_process_can_map_is_refused() -> None:
    size = 1 << 47
    with file(size) as fd:
        async with (
            session_of(FakeExporter([fd]), {BAR: FakeRegion(size)}) as session,
            exported_bar(session, BAR) as export,
        ):
            with pytest.raises(DmaBufError) as refusal:
                ExportView(export)
            assert (refusal.value.errno, export.importers) == (ENOMEM, ())


async def test_what_the_server_takes_away_reads_as_ones_until_it_is_faulted_in_again() -> None:
    async with an_export() as (export, _, server):
        with ExportView(export) as imported:
            os.ftruncate(server.fds[0], 0)
            assert bytes(imported.view[:4]) == ONES * 4
            with pytest.raises(DmaBufError) as refusal:
                imported.fault()
            assert refusal.value.errno == ENODEV
            os.ftruncate(server.fds[0], START + SIZE)
            os.pwrite(server.fds[0], b"back", START)
            imported.fault()
            assert (bytes(imported.view[:4]), export.maps) == (b"back", 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=6))
async def test_each_byte_of_a_view_is_the_byte_of_its_range(spans: list[tuple[int, int]]) -> None:
    ranges = tuple((first * PAGE, min(count, 4 - first) * PAGE) for first, count in spans)
    async with parts(*ranges) as (export, _):
        wanted = [first + page for first, count in spans for page in range(min(count, 4 - first))]
        with ExportView(export) as imported:
            assert list(imported.view[::PAGE]) == [2 + page for page in wanted]
        assert export.ranges == tuple(PhysVec(START + offset, length) for offset, length in ranges)


@pytest.mark.parametrize("revocation", Revocation)
async def test_a_cards_bar_is_lent_to_a_plain_client(revocation: Revocation, tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    async with served_card(path, revocation=revocation), client.connect(path) as session:
        await switch_memory(session, MEMORY_ON)
        async with exported_bar(session, 2, ((PAGE, PAGE),)) as export:
            with ExportView(export) as imported:
                imported.view[:5] = b"hello"
                assert await session.region_read(2, PAGE, 5) == b"hello"
                await switch_memory(session, MEMORY_OFF)
                assert bytes(imported.view[:5]) == ONES * 5
                await switch_memory(session, MEMORY_ON)
                assert bytes(imported.view[:5]) == b"hello"
                await session.reset()
                assert bytes(imported.view[:5]) == ONES * 5
                await switch_memory(session, MEMORY_ON)
                assert bytes(imported.view[:5]) == bytes(5)


@pytest.mark.parametrize("revocation", Revocation)
async def test_an_export_made_before_memory_is_on_is_mapped_once_it_is(
    revocation: Revocation, tmp_path: Path
) -> None:
    path = tmp_path / "card.sock"
    async with served_card(path, revocation=revocation), client.connect(path) as session:
        await switch_memory(session, MEMORY_OFF)
        async with exported_bar(session, 2) as export:
            assert export.revoked
            with pytest.raises(DmaBufError):
                ExportView(export)
            await switch_memory(session, MEMORY_ON)
            with ExportView(export) as imported:
                imported.view[-4:] = b"last"
            assert await session.region_read(2, session.regions[2].size - 4, 4) == b"last"


async def test_views_and_exports_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "card.sock"
    async with served_card(path), client.connect(path) as session:
        before = settled_fds()
        async with exported_bar(session, 2) as export:
            ExportView(export).close()
        assert open_fds() == before
        assert session.decoding._followers == []
