from __future__ import annotations

import logging
import os
from errno import EBUSY, EEXIST, EFAULT, EINVAL, EIO, ENODEV, ENOENT, ENOSPC

import pytest
import trio
import trio.testing

import client
from client.container import Mode, PageMemory, open_container
from protocol.limits import UNMAP_TIMEOUT
from protocol.vfio import DmaMapFlags
from tests.client.container.believer import Believed, believing, refused, saying, some_of, with_bar
from tests.client.peer import DMA_MAP, DMA_UNMAP

READ, WRITE = DmaMapFlags.READ, DmaMapFlags.WRITE


async def test_every_attached_device_reaches_the_same_memory_at_the_same_address() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        with PageMemory.allocate(0x3000) as memory:
            await container.attach(one)
            entry = await container.map(0x10000, memory.part(0x1000, 0x2000), READ)
            await container.attach(other)
            believed = Believed(0x2000, 1, 0x1000, os.fstat(memory.fd).st_ino)
            assert first.windows == second.windows == {0x10000: believed}
            assert (entry.iova, entry.size, entry.end, entry.present) == (0x10000, 0x2000, 0x12000, True)
            assert container.entries == (entry,)
            assert await container.unmap(0x10000, 0x2000) == 0x2000
            assert first.windows == second.windows == {}
            assert not entry.present
            assert not entry.mapped


async def test_attach_replays_what_is_mapped_and_detach_takes_it_back() -> None:
    async with believing() as (session, server), open_container() as container:
        with PageMemory.allocate(0x1000) as memory:
            for iova in (0x3000, 0x1000, 0x5000):
                await container.map(iova, memory)
            await container.attach(session)
            assert sorted(server.windows) == [0x1000, 0x3000, 0x5000]
            assert container.sessions == (session,)
            assert await refused(container.attach(session)) == EBUSY
            await container.detach(session)
            assert server.windows == {}
            assert [entry.present for entry in container.entries] == [True] * 3
            assert await refused(container.detach(session)) == ENODEV
            assert len(session.windows) == 0
            assert session.iovas.take(0x1000, at=0x3000) == 0x3000


async def test_the_container_detaches_everything_when_it_closes() -> None:
    async with believing() as (session, server):
        async with open_container() as container:
            await container.attach(session)
            with PageMemory.allocate(0x1000) as memory:
                entry = await container.map(0x1000, memory)
        assert server.windows == {}
        assert memory.fd == -1
        assert not entry.mapped


async def test_what_one_device_refuses_is_taken_back_from_the_others() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        second.refuse[DMA_MAP] = EIO
        with PageMemory.allocate(0x1000) as memory:
            assert await refused(container.map(0x1000, memory)) == EIO
            assert first.told == [(DMA_MAP, 0x1000, 0x1000, 3), (DMA_UNMAP, 0x1000, 0x1000)]
            assert first.windows == second.windows == {}
            assert container.entries == ()
            second.refuse.clear()
            await container.map(0x1000, memory)


async def test_a_window_that_could_not_be_taken_back_is_not_taken_for_the_next_one_there() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        second.refuse[DMA_MAP] = EIO
        first.refuse[DMA_UNMAP] = EBUSY
        with PageMemory.allocate(0x1000) as memory, PageMemory.allocate(0x1000) as wanted:
            assert await refused(container.map(0x1000, memory)) == EIO
            second.refuse.clear()
            assert await refused(container.map(0x1000, wanted)) == EBUSY
            assert second.windows == {}
            first.refuse.clear()
            await container.map(0x1000, wanted)
            believed = Believed(0x1000, 3, 0, os.fstat(wanted.fd).st_ino)
            assert first.windows == second.windows == {0x1000: believed}


async def test_a_device_that_refuses_the_replay_is_not_attached() -> None:
    async with believing() as (session, server), open_container() as container:
        with PageMemory.allocate(0x1000) as memory:
            await container.map(0x1000, memory)
            await container.map(0x2000, memory)
            session.iovas.take(0x1000, at=0x2000)
            assert await refused(container.attach(session)) == EEXIST
            assert server.windows == {}
            assert container.sessions == ()
            session.iovas.give(0x2000, 0x1000)
            await container.attach(session)


async def test_a_server_that_keeps_a_window_keeps_the_mapping_everywhere() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        with PageMemory.allocate(0x1000) as memory:
            entry = await container.map(0x1000, memory)
            await container.map(0x2000, memory)
            second.refuse[DMA_UNMAP] = EBUSY
            assert await refused(container.unmap(0x1000, 0x2000)) == EBUSY
            assert sorted(first.windows) == sorted(second.windows) == [0x1000, 0x2000]
            assert entry.present
            second.refuse.clear()
            assert await container.unmap(0x1000, 0x2000) == 0x2000
            assert first.windows == second.windows == {}


async def test_a_device_whose_server_keeps_a_window_is_detached_all_the_same() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory:
            await container.map(0x1000, memory)
            await container.map(0x2000, memory)
            server.refuse[DMA_UNMAP] = EBUSY
            assert await refused(container.detach(session)) == EBUSY
            assert container.sessions == ()
            assert len(server.told) == 4, "both were asked for"
            with pytest.raises(client.ClientError, match="in use"):
                session.iovas.take(0x1000, at=0x1000)


async def test_a_session_that_ends_is_simply_detached() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        with PageMemory.allocate(0x1000) as memory:
            await container.map(0x1000, memory)
            first.peer.sock.close()
            await one.wait_end()
            await trio.testing.wait_all_tasks_blocked()
            assert container.sessions == (other,)
            await container.map(0x2000, memory)
            assert sorted(second.windows) == [0x1000, 0x2000]
            assert len(one.windows) == 0


async def test_a_session_that_ends_in_the_middle_is_no_reason_to_refuse() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        first.gate = trio.Event()
        with PageMemory.allocate(0x1000) as memory:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(container.map, 0x1000, memory)
                await trio.testing.wait_all_tasks_blocked()
                one.hang_up("enough")
            assert sorted(second.windows) == [0x1000]
            assert container.entries[0].present


async def test_a_mapping_that_is_given_up_leaves_no_window_and_its_address_is_free() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        with PageMemory.allocate(0x1000) as memory:
            second.gate = trio.Event()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(container.map, 0x1000, memory)
                    await trio.testing.wait_all_tasks_blocked()
                    assert sorted(first.windows) == [0x1000]
                    scope.cancel()
                    with trio.CancelScope(shield=True):
                        await trio.testing.wait_all_tasks_blocked()
                    second.gate.set()
            assert scope.cancelled_caught
            assert first.windows == second.windows == {}
            assert len(one.windows) == len(other.windows) == 0
            assert container.entries == ()
            second.gate = None
            await container.map(0x1000, memory)


async def test_who_gives_up_a_mapping_waits_for_a_silent_server_only_so_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory:
            server.gate = trio.Event()
            start = trio.current_time()
            with trio.move_on_after(1) as scope:
                await container.map(0x1000, memory)
            assert scope.cancelled_caught
            assert trio.current_time() - start == pytest.approx(1 + UNMAP_TIMEOUT)
            server.gate.set()
            await container.map(0x1000, memory)  # when the first has been taken back
            assert sorted(server.windows) == [0x1000]
            assert [told[0] for told in server.told] == [DMA_MAP, DMA_UNMAP, DMA_MAP]


async def test_an_unmapping_that_is_given_up_happens_all_the_same() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory:
            await container.map(0x1000, memory)
            server.gate = trio.Event()
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(container.unmap, 0x1000, 0x1000)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            assert scope.cancelled_caught
            server.gate.set()
            await container.map(0x1000, memory)
            assert [told[0] for told in server.told] == [DMA_MAP, DMA_UNMAP, DMA_MAP]


async def test_a_container_closes_though_a_server_is_silent(autojump_clock: trio.testing.MockClock) -> None:
    async with believing() as (session, server):
        with PageMemory.allocate(0x1000) as memory:
            async with open_container() as container:
                await container.attach(session)
                await container.map(0x1000, memory)
                server.gate = trio.Event()
                with trio.move_on_after(1):
                    await container.map(0x2000, memory)
            assert container.entries == ()
            server.gate.set()


async def test_permissions_change_on_every_device() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        with PageMemory.allocate(0x1000) as memory:
            entry = await container.map(0x1000, memory)
            assert await container.protect(0x1000, 0x1000, READ) == 0x1000
            assert first.windows[0x1000].flags == second.windows[0x1000].flags == READ
            assert (entry.flags, entry.present, entry.losses) == (READ, True, 1)
            assert await first.reads(0x1000, 1) == b"\0"


async def test_permissions_are_as_they_were_if_one_device_refuses() -> None:
    async with believing() as (one, first), believing() as (other, second), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        with PageMemory.allocate(0x1000) as memory, PageMemory.allocate(0x1000) as more:
            entries = [await container.map(0x1000, memory), await container.map(0x2000, more)]
            second.refuse_window = (0x2000, 1)
            assert await refused(container.protect(0x1000, 0x2000, READ)) == EIO
            for server in (first, second):
                assert [window.flags for window in server.windows.values()] == [3, 3]
            assert [entry.flags for entry in entries] == [READ | WRITE] * 2
            assert all(entry.present for entry in entries)


@pytest.mark.parametrize(("mode", "errno"), [(Mode.TYPE1V2, EINVAL), (Mode.IOMMUFD, ENOENT)])
async def test_permissions_of_nothing_cannot_be_changed(mode: Mode, errno: int) -> None:
    async with open_container(mode) as container:
        assert await refused(container.protect(0x1000, 0x1000, READ)) == errno


async def test_permissions_are_reading_or_writing() -> None:
    async with open_container() as container:
        with PageMemory.allocate(0x1000) as memory:
            await container.map(0x1000, memory)
            assert await refused(container.protect(0x1000, 0x1000, DmaMapFlags(0))) == EINVAL
            assert await refused(container.protect(0x1000, 0x1000, DmaMapFlags(4))) == EINVAL


async def test_a_read_only_file_is_for_reading() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory:
            fd = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDONLY)
            with PageMemory(fd, 0, 0x1000) as read_only:
                os.close(fd)
                assert await refused(container.map(0x1000, read_only)) == EFAULT
                assert server.told == []
                await container.map(0x1000, read_only, READ)
                assert await refused(container.protect(0x1000, 0x1000, READ | WRITE)) == EFAULT
                assert server.windows[0x1000].flags == READ


async def test_a_window_whose_descriptor_cannot_be_mapped_falls_back_to_messages() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        server.refuse_files = EINVAL
        with PageMemory.allocate(0x1000) as memory:
            memory.view[:5] = b"hello"
            await container.map(0x1000, memory)
            assert server.windows == {0x1000: Believed(0x1000, 3, 0, None)}
            assert [told[0] for told in server.told] == [DMA_MAP, DMA_MAP]
            assert await server.reads(0x1000, 5) == b"hello"


async def test_what_a_server_says_of_the_descriptor_is_told_if_it_wants_no_messages_either() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        server.refuse_files = EINVAL
        server.refuse_messages = ENOSPC
        with PageMemory.allocate(0x1000) as memory:
            assert await refused(container.map(0x1000, memory)) == EINVAL
            assert server.windows == {}


async def test_a_window_of_which_nobody_knows_whether_it_is_mapped_is_taken_back() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        server.nonsense = {DMA_MAP}
        with PageMemory.allocate(0x1000) as memory:
            assert await refused(container.map(0x1000, memory)) == EIO
            assert server.told == [(DMA_UNMAP, 0x1000, 0x1000)], "which the server does not know of"
            server.nonsense.clear()
            await container.map(0x1000, memory)


async def test_a_server_of_which_nobody_knows_whether_it_let_go_loses_its_session() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory:
            await container.map(0x1000, memory)
            server.nonsense = {DMA_UNMAP}
            assert await container.unmap(0x1000, 0x1000) == 0x1000
        assert "nobody knows" in str(await session.wait_end())


async def test_a_free_address_is_free_in_every_session() -> None:
    async with believing() as (session, _), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory:
            async with container.mapped(None, memory) as first:
                pass
            session.iovas.take(0x1000, at=first.iova)
            async with container.mapped(None, memory) as second:
                assert second.iova == first.iova + 0x1000
            assert container.entries == ()


async def test_a_block_that_fails_unmaps_what_it_had() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory, pytest.raises(KeyError):
            async with container.mapped(0x1000, memory):
                raise KeyError
        assert server.windows == {}


async def test_a_block_may_unmap_what_it_has() -> None:
    async with open_container() as container:
        with PageMemory.allocate(0x1000) as memory:
            async with container.mapped(0x1000, memory) as entry:
                await container.unmap(entry.iova, entry.size)
                await container.map(0x1000, memory)
            assert len(container.entries) == 1, "that of the block is gone, and this is another"


async def test_windows_are_of_the_servers_pages() -> None:
    async with believing(capabilities=saying(pgsizes=1 << 16)) as (session, _), open_container() as container:
        with PageMemory.allocate(0x10000) as memory:
            await container.map(0x1000, memory)
            assert await refused(container.attach(session)) == EINVAL
            await container.unmap(0x1000, 0x10000)
            await container.attach(session)
            assert await refused(container.map(0x1000, memory)) == EINVAL
            assert await refused(container.map(0x10000, memory.part(0, 0x1000))) == EINVAL
            async with container.mapped(None, memory) as entry:
                assert entry.iova % 0x10000 == 0


async def test_no_more_windows_are_asked_for_than_the_server_takes() -> None:
    async with (
        believing(capabilities=saying(max_dma_maps=1)) as (session, server),
        open_container() as container,
    ):
        await container.attach(session)
        with PageMemory.allocate(0x1000) as memory:
            await container.map(0x1000, memory)
            assert await refused(container.map(0x2000, memory)) == ENOSPC
            assert len(server.told) == 1


async def test_a_huge_range_unmaps_many_mappings_or_none_at_once_and_quietly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        assert await container.unmap(0, 1 << 63) == 0
        assert server.told == []
        with PageMemory.allocate(0x1000) as memory:
            for number in range(300):
                await container.map(0x10000 + number * 0x2000, memory)
            assert await container.unmap(0, 1 << 63) == 300 * 0x1000
        assert server.windows == {}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("mode", "iova", "size", "unmapped"),
    [
        (Mode.TYPE1, 0x1000, 0x1000, 0x2000),  # the first address of it: all of it
        (Mode.TYPE1, 0x2000, 0x1000, 0),  # the middle of it: nothing, and no error
        (Mode.TYPE1, 0x2000, 0x4000, 0),  # nor is what follows
        (Mode.TYPE1, 0, 0x5000, 0x4000),
        (Mode.TYPE1V2, 0, 0x5000, EINVAL),
        (Mode.TYPE1V2, 0x2000, 0x3000, EINVAL),
        (Mode.TYPE1V2, 0, 0x1000, 0),
        (Mode.TYPE1V2, 0, 0x8000, 0x4000),
        (Mode.IOMMUFD, 0, 0x5000, ENOENT),
        (Mode.IOMMUFD, 0x2000, 0x3000, ENOENT),
        (Mode.IOMMUFD, 0, 0x1000, ENOENT),
        (Mode.IOMMUFD, 0x123, 0x3000, 0x2000),  # no page begins there, which is all the same to it
        (Mode.IOMMUFD, 0, 0x8000, 0x4000),
    ],
)
async def test_the_modes_differ_in_what_a_range_unmaps(
    mode: Mode, iova: int, size: int, unmapped: int
) -> None:
    async with believing() as (session, server), open_container(mode) as container:
        await container.attach(session)
        with PageMemory.allocate(0x2000) as memory:
            await container.map(0x1000, memory)
            await container.map(0x4000, memory)
            if unmapped in (EINVAL, ENOENT):
                assert await refused(container.unmap(iova, size)) == unmapped
                assert len(server.windows) == 2
            else:
                assert await container.unmap(iova, size) == unmapped
                assert len(server.windows) == 2 - unmapped // 0x2000


async def test_everything_is_taken_back_when_all_is_cancelled_at_once() -> None:
    async with with_bar() as (owner, _, mapping), believing() as (session, server):
        with trio.CancelScope() as scope:
            async with open_container() as container:
                await container.attach(session)
                with PageMemory.allocate(0x1000) as memory:
                    async with (
                        container.mapped(0x1000, memory),
                        container.mapped(0x10000, some_of(mapping)),
                        trio.open_nursery() as nursery,
                    ):
                        server.gate = trio.Event()
                        nursery.start_soon(container.map, 0x2000, memory)
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
                        server.gate.set()
        assert scope.cancelled_caught
        assert server.windows == {}
        for iova in (0x1000, 0x2000, 0x10000):
            assert not session.iovas.in_use(iova, 0x1000)
        mapping.close()  # nobody holds a view of it
        assert owner.decoding.enabled


async def test_what_is_under_way_when_all_is_cancelled_is_carried_through() -> None:
    async with believing() as (session, server):
        with trio.CancelScope() as scope:
            async with open_container() as container:
                await container.attach(session)
                with PageMemory.allocate(0x1000) as memory:
                    await container.map(0x1000, memory)
                    async with trio.open_nursery() as nursery:
                        server.gate = trio.Event()
                        nursery.start_soon(container.unmap, 0x1000, 0x1000)
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
                        server.gate.set()
        assert server.told == [(DMA_MAP, 0x1000, 0x1000, 3), (DMA_UNMAP, 0x1000, 0x1000)]
        assert not session.iovas.in_use(0x1000, 0x1000)


async def test_a_container_that_is_closed_maps_and_attaches_nothing() -> None:
    async with open_container() as container:
        pass
    async with believing() as (session, _):
        with PageMemory.allocate(0x1000) as memory:
            assert await refused(container.map(0x1000, memory)) == ENODEV
            assert await refused(container.unmap(0x1000, 0x1000)) == ENODEV
        assert await refused(container.attach(session)) == ENODEV
