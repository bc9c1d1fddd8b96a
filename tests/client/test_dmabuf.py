from __future__ import annotations

import mmap
import os
import struct
from errno import EBUSY, EINVAL, ENODEV, EOPNOTSUPP

import pytest
import trio
import trio.testing

from client.dmabuf import export_bar, exported_bar
from client.errors import BadReplyError, ClientError, ServerError
from client.phys_vec import PhysVec
from protocol.limits import MAX_DMA_BUF_RANGES, REVOKE_TIMEOUT
from protocol.vfio import Feature
from tests.client.exporter import (
    BAR,
    GET_DMA_BUF,
    MEMORY_OFF,
    MEMORY_ON,
    PAGE,
    REGIONS,
    SIZE,
    START,
    FakeExporter,
    Slow,
    a_session,
    an_export,
    attached,
    file,
    quick,
    refused,
    session_of,
    switch_memory,
)
from tests.client.peer import FEATURE, FakeRegion, session_with
from tests.descriptors import open_fds, settled_fds

# --- what is asked for, and what comes


async def test_all_of_a_bar_is_exported_unless_parts_are_asked_for() -> None:
    async with an_export() as (export, _, server):
        assert export.ranges == (PhysVec(START, SIZE),)
        head = struct.pack("=IIIIII", 40, GET_DMA_BUF, BAR, os.O_RDWR | os.O_CLOEXEC, 0, 1)
        assert server.asked == [head + struct.pack("=QQ", 0, SIZE)]
        assert not export.revoked


async def test_ranges_count_from_the_region_and_are_found_in_its_file() -> None:
    parts = ((2 * PAGE, PAGE), (0, PAGE))
    async with a_session() as (session, _), exported_bar(session, BAR, parts) as export:
        assert export.ranges == (PhysVec(START + 2 * PAGE, PAGE), PhysVec(START, PAGE))
        assert attached(export, quick()).map() == export.ranges


@pytest.mark.parametrize("offset", [0, 8 << 30, (16 << 30) - 2 * PAGE])
async def test_ranges_of_more_than_8_gib_are_found_in_a_sparse_file(offset: int) -> None:
    size = 16 << 30
    with file(START + size) as fd:
        os.pwrite(fd, b"here", START + offset + PAGE)
        async with (
            session_of(FakeExporter([fd]), {BAR: FakeRegion(size, offset=START)}) as session,
            exported_bar(session, BAR, ((offset, size - offset),)) as export,
        ):
            ((paddr, length),) = [(one.paddr, one.len) for one in attached(export, quick()).map()]
            assert (paddr, length) == (START + offset, size - offset)
            with mmap.mmap(export.fd, 2 * PAGE, offset=paddr) as memory:
                assert memory[PAGE : PAGE + 4] == b"here"


async def test_a_refusal_comes_through() -> None:
    async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:

        async def refuse() -> None:
            peer.refuse(await peer.expect(FEATURE), ENODEV)

        nursery.start_soon(refuse)
        with pytest.raises(ServerError) as refusal:
            await export_bar(session, 6, ((0, PAGE),))
        assert refusal.value.errno == ENODEV


@pytest.mark.parametrize(
    ("index", "ranges"),
    [
        (9, ((0, PAGE),)),
        (-1, ((0, PAGE),)),
        (BAR, ()),
        (BAR, ((-PAGE, PAGE),)),
        (BAR, ((0, 1 << 64),)),
        (BAR, ((0, PAGE),) * (MAX_DMA_BUF_RANGES + 1)),
    ],
)
async def test_what_no_server_takes_is_not_asked_for(index: int, ranges: tuple[tuple[int, int], ...]) -> None:
    async with a_session() as (session, server):
        with pytest.raises(ClientError):
            await export_bar(session, index, ranges)
        assert server.asked == []


# --- hostile servers


def said(index: int, *ranges: tuple[int, int]) -> bytes:
    head = struct.pack("=IIII", index, os.O_RDWR | os.O_CLOEXEC, 0, len(ranges))
    return head + b"".join(struct.pack("=QQ", *one) for one in ranges)


@pytest.mark.parametrize(
    ("fds", "size", "data", "cut"),
    [
        (0, START + SIZE, None, 0),
        (2, START + SIZE, None, 0),
        (8, START + SIZE, None, 0),
        (1, START + SIZE - 1, None, 0),
        (1, SIZE, None, 0),
        (1, 1, None, 0),
        (1, START + SIZE, said(BAR, (0, PAGE)), 0),
        (1, START + SIZE, said(BAR - 1, (0, SIZE)), 0),
        (1, START + SIZE, said(BAR, (0, SIZE), (0, SIZE)), 0),
        (1, START + SIZE, said(BAR), 0),
        (1, START + SIZE, None, 1),
        (1, START + SIZE, None, 16),
        (1, START + SIZE, None, 33),
    ],
    ids=[
        "no descriptor",
        "two",
        "eight",
        "a file one byte short",
        "a file without what is before the BAR",
        "a file of one byte",
        "another range",
        "another BAR",
        "one range more",
        "no range",
        "a byte cut off",
        "the range cut off",
        "a cut record",
    ],
)
async def test_an_answer_that_makes_no_sense_leaves_no_descriptor(
    fds: int, size: int, data: bytes | None, cut: int
) -> None:
    before = settled_fds()
    with file(size) as fd:
        async with session_of(FakeExporter([fd] * fds, data, cut=cut)) as session:
            held = open_fds()
            with pytest.raises(BadReplyError):
                await export_bar(session, BAR)
            assert open_fds() == held
            assert session.decoding._followers == []
    assert open_fds() == before


async def test_a_range_beyond_the_end_of_any_file_is_not_believed() -> None:
    with file(0) as fd:
        regions = {BAR: FakeRegion(SIZE, offset=(1 << 63) - PAGE)}
        async with session_of(FakeExporter([fd]), regions) as session:
            with pytest.raises(BadReplyError, match="ends at"):
                await export_bar(session, BAR)


async def test_no_descriptor_is_left_when_nobody_waits_for_the_answer() -> None:
    with file() as fd:
        async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:
            before = settled_fds()
            with trio.CancelScope() as scope:
                nursery.start_soon(export_bar, session, BAR)
                asked = await peer.expect(FEATURE)
                scope.cancel()
                nursery.cancel_scope.cancel()
                await trio.lowlevel.checkpoint()
            peer.reply(asked, asked.payload, (fd,))
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            assert open_fds() == before


async def test_a_feature_that_is_got_as_bytes_leaves_no_descriptor() -> None:
    async with a_session() as (session, _):
        before = settled_fds()
        data = said(BAR, (0, SIZE))
        assert await session.feature_get(Feature.DMA_BUF, data, room=len(data)) == data
        assert open_fds() == before


async def test_a_descriptor_with_another_feature_makes_no_sense() -> None:
    with file() as fd:
        async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:
            before = settled_fds()

            async def answer() -> None:
                asked = await peer.expect(FEATURE)
                peer.reply(asked, asked.payload + bytes(8), (fd,))

            nursery.start_soon(answer)
            with pytest.raises(BadReplyError, match="1 descriptors"):
                await session.feature_get(Feature.MIGRATION, room=8)
            assert open_fds() == before


# --- attachments


async def test_an_importer_that_cannot_be_told_to_let_go_is_refused() -> None:
    async with an_export() as (export, session, _):
        refused(lambda: export.attach(object()), EOPNOTSUPP)  # type: ignore[arg-type]
        await switch_memory(session, MEMORY_OFF)
        refused(lambda: export.attach(object()), EOPNOTSUPP)  # type: ignore[arg-type]
        assert not export.importers


async def test_maps_are_counted_and_never_fewer_than_none() -> None:
    async with an_export() as (export, _, _):
        importer = quick()
        attachment = attached(export, importer, maps=2)
        assert export.importers == (importer,)
        assert (attachment.maps, export.maps) == (2, 2)
        refused(attachment.detach, EBUSY)
        attachment.unmap()
        attachment.unmap()
        refused(attachment.unmap, EINVAL)
        assert (attachment.maps, export.maps) == (0, 0)
        attachment.detach()
        assert not export.importers
        refused(attachment.map, EINVAL)
        refused(attachment.detach, EINVAL)


async def test_memory_that_the_server_took_away_cannot_be_mapped() -> None:
    async with an_export() as (export, _, server):
        attachment = export.attach(quick())
        os.ftruncate(server.fds[0], START + SIZE - PAGE)
        refused(attachment.map, ENODEV)
        os.ftruncate(server.fds[0], START + SIZE)
        assert attachment.map() == export.ranges
        attachment.unmap()


async def test_a_server_that_keeps_the_memory_away_exports_an_empty_file() -> None:
    with file(0) as fd:
        async with session_of(FakeExporter([fd])) as session, exported_bar(session, BAR) as export:
            attachment = export.attach(quick())
            refused(attachment.map, ENODEV)
            os.ftruncate(fd, START + SIZE)
            attachment.map()
            attachment.unmap()


# --- the end


async def test_closed_with_a_live_importer_it_is_revoked_first() -> None:
    async with a_session() as (session, _):
        importer = quick()
        async with exported_bar(session, BAR) as export:
            attachment = attached(export, importer)
        assert (importer.told, attachment.maps, export.fd) == (1, 0, -1)
        refused(attachment.map, ENODEV)
        refused(lambda: export.attach(quick()), ENODEV)
        assert session.decoding._followers == []
        await export.restore()
        assert export.revoked
        await export.aclose()
        attachment.detach()


async def test_a_block_that_fails_waits_for_importers_for_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with a_session() as (session, _):
        slow = Slow()
        before = trio.current_time()
        exports = []
        with pytest.raises(KeyError):  # noqa: PT012  (the block is what is tested)
            async with exported_bar(session, BAR) as export:
                exports.append(export)
                attached(export, slow)
                raise KeyError
        assert trio.current_time() - before == pytest.approx(REVOKE_TIMEOUT, abs=0.1)
        assert [(slow.told, export.maps, export.fd) for export in exports] == [(1, 1, -1)]


async def test_a_block_that_is_cancelled_tells_importers_to_let_go() -> None:
    async with a_session() as (session, _):
        importer = quick()
        with trio.CancelScope() as scope:
            async with exported_bar(session, BAR) as export:
                attachment = attached(export, importer)
                scope.cancel()
                await trio.sleep_forever()
        assert (importer.told, attachment.maps) == (1, 0)


async def test_the_descriptor_outlives_the_session_and_importers_are_told() -> None:
    async with a_session() as (session, server):
        importer = quick()
        async with exported_bar(session, BAR) as export:
            attachment = attached(export, importer)
            session.hang_up("enough")
            await trio.testing.wait_all_tasks_blocked()
            assert (importer.told, attachment.maps) == (1, 0)
            assert export.revoked
            refused(attachment.map, ENODEV)
            os.pwrite(server.fds[0], b"still there", START)
            assert os.pread(export.fd, 11, START) == b"still there"


async def test_an_export_that_is_not_followed_is_revoked_when_it_is_closed() -> None:
    async with a_session() as (session, _):
        export = await export_bar(session, BAR)
        importer = quick()
        attached(export, importer)
        session.hang_up("enough")
        refused(lambda: export.attach(quick()), ENODEV)
        assert importer.told == 0
        await export.aclose()
        assert (importer.told, export.maps) == (1, 0)


async def test_a_device_is_not_switched_off_before_one_who_lets_go_of_a_closed_export_has(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with a_session() as (session, server):
        slow = Slow()
        export = await export_bar(session, BAR)
        attached(export, slow)
        with trio.move_on_after(1):
            await export.aclose()
        assert (export.maps, export.fd) == (1, -1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(switch_memory, session, MEMORY_OFF)
            await trio.testing.wait_all_tasks_blocked()
            assert server.written == []
            slow.lets_go.set()
        assert (export.maps, server.written) == (0, [MEMORY_OFF])
        assert session.decoding._followers == []


async def test_a_closed_export_is_not_restored_while_it_is_waited_for() -> None:
    async with a_session() as (session, server):
        slow = Slow()
        export = await export_bar(session, BAR)
        attachment = attached(export, slow)

        async def off_and_on() -> None:
            await switch_memory(session, MEMORY_OFF)
            await switch_memory(session, MEMORY_ON)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(export.aclose)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(off_and_on)
            await trio.testing.wait_all_tasks_blocked()
            assert server.written == []
            slow.lets_go.set()
        assert server.written == [MEMORY_OFF, MEMORY_ON]
        assert (export.revoked, attachment.maps, slow.back) == (True, 0, 0)
