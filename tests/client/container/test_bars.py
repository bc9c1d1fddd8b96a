"""BARs in a container: faulted in, taken back before they vanish, back when they are."""

from __future__ import annotations

import logging
import os
from errno import EAGAIN, EBUSY, EFAULT, EIO, ENODEV, EOPNOTSUPP
from functools import partial

import pytest
import trio
import trio.testing

import client
from client.container import BarRange, Mode, PageMemory, open_container
from client.container.limits import FAULT_TRIES, REVOKE_TRIES
from client.dmabuf import exported_bar
from client.mapping import BarMapping, MappingState
from client.phys_vec import PhysVec
from protocol.vfio import DmaMapFlags, RegionIndex
from tests.client.container.believer import (
    BAR_OFFSET,
    Believed,
    believing,
    beside_a_bar,
    refused,
    set_memory,
    some_of,
    with_bar,
)
from tests.client.peer import DMA_MAP, DMA_UNMAP, REGION_WRITE, RESET, FakeRegion

READ = DmaMapFlags.READ
TYPE1_MODES = pytest.mark.parametrize("mode", [Mode.TYPE1, Mode.TYPE1V2], ids=lambda mode: mode.value)


@TYPE1_MODES
async def test_a_bar_is_faulted_in_and_mapped_by_its_file(mode: Mode) -> None:
    async with beside_a_bar(mode) as ((_, _, mapping), (_, server), container):
        assert mapping.state is MappingState.FAULTABLE
        entry = await container.map(0x10000, some_of(mapping, 0x1000, 0x2000))
        assert mapping.read(0x1000, 4) == 0
        inode = os.fstat(mapping.fd).st_ino
        assert server.windows == {0x10000: Believed(0x2000, 3, BAR_OFFSET + 0x1000, inode)}
        assert container.locked_pages == 0
        mapping.view(0x1000, 5)[:] = b"there"
        assert await server.reads(0x10000, 5) == b"there"
        await container.unmap(0x10000, 0x2000)
        assert not entry.present


async def test_iommufd_pins_pages_and_a_bar_has_none() -> None:
    async with with_bar() as (_, _, mapping), open_container(Mode.IOMMUFD) as container:
        assert await refused(container.map(0x10000, some_of(mapping))) == EFAULT
        assert container.entries == ()


async def test_a_bar_that_cannot_be_faulted_in_cannot_be_mapped() -> None:
    async with with_bar() as (owner, _, mapping), open_container() as container:
        await set_memory(owner, False)
        assert await refused(container.map(0x10000, some_of(mapping))) == EFAULT
        await set_memory(owner, True)
        assert await refused(container.map(0x10000, BarRange(mapping, 0x7000, 0x2000))) == EFAULT
        await container.map(0x10000, some_of(mapping))


async def test_a_read_only_bar_is_for_reading() -> None:
    async with with_bar(flags=5) as (_, _, mapping), open_container() as container:
        assert await refused(container.map(0x10000, some_of(mapping))) == EFAULT
        await container.map(0x10000, some_of(mapping), READ)


async def test_it_is_taken_back_from_every_device_before_the_bar_vanishes_and_is_back_with_it() -> None:
    async with (
        with_bar() as (owner, device, mapping),
        believing() as (one, first),
        believing() as (other, second),
        open_container() as container,
    ):
        await container.attach(one)
        await container.attach(other)
        entry = await container.map(0x10000, some_of(mapping))
        second.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(set_memory, owner, False)
            await trio.testing.wait_all_tasks_blocked()
            assert first.windows == {}
            assert mapping.state is MappingState.ZAPPED
            assert device.told == [], "the write waits for the last of them"
            second.gate.set()
            with trio.fail_after(5):
                await entry.wait_gone()
        assert device.told == [(REGION_WRITE,)]
        assert second.windows == {}
        assert (entry.present, entry.losses, entry.error) == (False, 1, None)
        await set_memory(owner, True)
        with trio.fail_after(5):
            await entry.wait_back()
        assert sorted(first.windows) == sorted(second.windows) == [0x10000]


async def test_the_owner_of_a_bar_may_be_attached_to_the_same_container() -> None:
    async with with_bar() as (owner, server, mapping), open_container() as container:
        await container.attach(owner)
        await container.map(0x10000, some_of(mapping))
        await owner.reset()
        assert [told[0] for told in server.told] == [DMA_MAP, DMA_UNMAP, RESET]
        await set_memory(owner, True)
        assert sorted(server.windows) == [0x10000]


async def test_whoever_is_attached_while_a_bar_is_away_gets_it_when_it_is_back() -> None:
    async with (
        with_bar() as (owner, _, mapping),
        believing() as (session, server),
        open_container() as container,
    ):
        await container.map(0x10000, some_of(mapping))
        await set_memory(owner, False)
        await container.attach(session)
        assert server.windows == {}
        await set_memory(owner, True)
        assert sorted(server.windows) == [0x10000]


async def test_a_mapping_that_is_unmapped_while_it_is_away_does_not_come_back() -> None:
    async with beside_a_bar() as ((owner, _, mapping), (_, server), container):
        entry = await container.map(0x10000, some_of(mapping))
        await set_memory(owner, False)
        assert await container.unmap(0x10000, 0x2000) == 0x2000
        await set_memory(owner, True)
        assert server.windows == {}
        with pytest.raises(client.ClientError, match="is gone"):
            await entry.wait_back()


async def test_a_mapping_that_goes_while_it_is_about_to_come_back_does_not() -> None:
    async with beside_a_bar() as ((owner, _, mapping), (_, server), container):
        entry = await container.map(0x10000, some_of(mapping))
        await set_memory(owner, False)
        server.gate = trio.Event()
        with PageMemory.allocate(0x1000) as memory:
            async with trio.open_nursery() as nursery:
                for call in (
                    partial(container.map, 0x1000, memory),  # which the others wait for
                    partial(container.unmap, 0x10000, 0x2000),
                    partial(set_memory, owner, True),
                ):
                    nursery.start_soon(call)
                    await trio.testing.wait_all_tasks_blocked()
                server.gate.set()
        assert sorted(server.windows) == [0x1000]
        assert not entry.present


async def test_permissions_that_change_while_a_bar_is_away_hold_when_it_is_back() -> None:
    async with beside_a_bar() as ((owner, _, mapping), (_, server), container):
        await container.map(0x10000, some_of(mapping))
        await set_memory(owner, False)
        await container.protect(0x10000, 0x2000, READ)
        await set_memory(owner, True)
        assert server.windows[0x10000].flags == READ


async def test_permissions_that_a_bar_never_has_are_refused_while_it_is_away_too() -> None:
    async with with_bar(flags=5) as (owner, _, mapping), open_container() as container:
        entry = await container.map(0x10000, some_of(mapping), READ)
        await set_memory(owner, False)
        assert await refused(container.protect(0x10000, 0x2000, READ | DmaMapFlags.WRITE)) == EFAULT
        await set_memory(owner, True)
        assert (entry.present, entry.flags) == (True, READ)


async def test_what_cannot_come_back_says_so_and_whoever_writes_command_hears_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with beside_a_bar() as ((owner, _, mapping), (_, server), container):
        entry = await container.map(0x10000, some_of(mapping))
        await set_memory(owner, False)
        server.refuse[DMA_MAP] = EIO
        with caplog.at_level(logging.WARNING):
            await set_memory(owner, True)
        assert "what was mapped at 0x10000 does not come back" in caplog.text
        assert not entry.present
        with pytest.raises(client.ClientError, match="EIO"):
            await entry.wait_back()
        server.refuse.clear()
        await set_memory(owner, False)
        await set_memory(owner, True)
        await entry.wait_back()
        assert entry.error is None


async def test_a_bar_goes_with_its_owners_session() -> None:
    async with believing() as (session, server), open_container() as container:
        await container.attach(session)
        async with with_bar() as (owner, _, mapping):
            entry = await container.map(0x10000, some_of(mapping))
            owner.hang_up("enough")
            with trio.fail_after(5):
                await entry.wait_gone()
            assert server.windows == {}
            await container.unmap(0x10000, 0x2000)


async def test_a_server_that_keeps_a_window_of_a_bar_loses_its_session(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with beside_a_bar() as ((owner, device, mapping), (session, server), container):
        entry = await container.map(0x10000, some_of(mapping))
        server.refuse[DMA_UNMAP] = EBUSY
        with caplog.at_level(logging.ERROR):
            await set_memory(owner, False)
        assert "its session is ended" in caplog.text
        assert [told[0] for told in server.told] == [DMA_MAP] + [DMA_UNMAP] * REVOKE_TRIES
        assert device.told == [(REGION_WRITE,)]
        await session.wait_end()
        assert not entry.present


async def test_a_server_that_keeps_a_window_of_a_bar_when_it_is_detached_loses_its_session() -> None:
    async with beside_a_bar() as ((_, _, mapping), (session, server), container):
        await container.map(0x10000, some_of(mapping))
        server.refuse[DMA_UNMAP] = EBUSY
        await container.detach(session)
        await session.wait_end()
        assert container.sessions == ()


async def test_a_server_that_keeps_a_window_of_a_bar_that_another_refused_loses_its_session() -> None:
    async with (
        beside_a_bar() as ((owner, _, mapping), (session, server), container),
        believing() as (other, refusing),
    ):
        await container.attach(other)
        refusing.refuse[DMA_MAP] = EIO
        server.refuse[DMA_UNMAP] = EBUSY
        assert await refused(container.map(0x10000, some_of(mapping))) == EIO
        await session.wait_end()
        await set_memory(owner, False)


async def test_a_server_that_keeps_a_window_which_is_unmapped_while_its_bar_vanishes_loses_its_session() -> (
    None
):
    async with beside_a_bar() as ((owner, device, mapping), (session, server), container):
        await container.map(0x10000, some_of(mapping))
        server.refuse[DMA_UNMAP] = EBUSY
        server.gate = trio.Event()

        async def unmap() -> None:
            assert await refused(container.unmap(0x10000, 0x2000)) == EBUSY

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unmap)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(set_memory, owner, False)
            await trio.testing.wait_all_tasks_blocked()
            assert device.told == []
            server.gate.set()
        await session.wait_end()
        assert device.told == [(REGION_WRITE,)]


async def test_nobody_is_given_the_descriptor_of_a_session_that_has_ended() -> None:
    fd = os.memfd_create("bar")
    os.ftruncate(fd, 0x4000)
    regions: dict[int, FakeRegion] = {RegionIndex.BAR2: FakeRegion(0x4000, 7, fds=(fd,))}
    over = trio.Event()
    lent: list[BarMapping] = []

    async def lend(task_status: trio.TaskStatus[client.Session]) -> None:
        async with believing(regions=regions) as (owner, _):
            lent.append(BarMapping(owner.regions[RegionIndex.BAR2], owner.decoding))
            task_status.started(owner)
            await over.wait()

    async with (
        believing() as (one, first),
        believing() as (other, second),
        open_container() as container,
        trio.open_nursery() as nursery,
    ):
        owner: client.Session = await nursery.start(lend)
        number = owner.regions[RegionIndex.BAR2].fd
        await container.attach(one)
        await container.attach(other)
        first.gate = trio.Event()

        async def map_it() -> None:
            assert await refused(container.map(0x10000, BarRange(lent[0], 0, 0x4000))) == EFAULT

        nursery.start_soon(map_it)
        await trio.testing.wait_all_tasks_blocked()
        over.set()
        await owner.wait_end()
        await trio.testing.wait_all_tasks_blocked()
        os.dup2(fd, number)  # any other file
        first.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        assert (first.windows, second.told) == ({}, [])
        os.close(number)
        lent[0].close()
    os.close(fd)


async def test_whoever_gives_up_switching_memory_off_has_still_sent_for_the_windows() -> None:
    async with beside_a_bar() as ((owner, device, mapping), (_, server), container):
        entry = await container.map(0x10000, some_of(mapping))
        server.gate = trio.Event()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(set_memory, owner, False)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert device.told == []
        server.gate.set()
        with trio.fail_after(5):
            await entry.wait_gone()
        assert server.windows == {}


class Fickle(BarMapping):
    """A mapping that is taken away each time that it was faulted in, or looked up, so often."""

    times = 0
    after_fault = True

    def fault(self, offset: int | None = None, length: int | None = None) -> None:
        super().fault(offset, length)
        self._maybe_zap(self.after_fault)

    def translate(self, offset: int, length: int) -> tuple[PhysVec, ...]:
        found = super().translate(offset, length)
        self._maybe_zap(not self.after_fault)
        return found

    def _maybe_zap(self, now: bool) -> None:
        if now and self.times:
            self.times -= 1
            self.zap()


@pytest.mark.parametrize("after_fault", [True, False])
@pytest.mark.parametrize("times", [1, FAULT_TRIES - 2])
async def test_a_mapping_that_changes_while_it_is_faulted_in_is_looked_up_again(
    times: int, after_fault: bool
) -> None:
    async with beside_a_bar(Mode.TYPE1V2, Fickle) as ((_, _, mapping), (_, server), container):
        assert isinstance(mapping, Fickle)
        mapping.times, mapping.after_fault = times, after_fault
        entry = await container.map(0x10000, some_of(mapping))
        assert entry.present
        assert mapping.generation == times
        assert [told[0] for told in server.told] == [DMA_MAP], "no device was told of what was gone"


async def test_a_mapping_that_always_changes_is_given_up() -> None:
    async with beside_a_bar(Mode.TYPE1V2, Fickle) as ((_, _, mapping), (_, server), container):
        assert isinstance(mapping, Fickle)
        mapping.times = 10 * FAULT_TRIES
        assert await refused(container.map(0x10000, some_of(mapping))) == EAGAIN
        assert server.told == []


async def test_a_bar_that_vanishes_while_devices_are_told_of_it_is_taken_back_and_refused() -> None:
    async with beside_a_bar() as ((owner, device, mapping), (_, server), container):
        server.gate = trio.Event()
        errnos: list[int] = []

        async def map_it() -> None:
            errnos.append(await refused(container.map(0x10000, some_of(mapping))))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(map_it)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(set_memory, owner, False)
            await trio.testing.wait_all_tasks_blocked()
            assert device.told == []
            server.gate.set()
        assert errnos == [EFAULT]
        assert [told[0] for told in server.told] == [DMA_MAP, DMA_UNMAP]
        assert device.told == [(REGION_WRITE,)]


async def test_a_bar_that_vanished_and_came_back_meanwhile_is_told_of_again() -> None:
    async with beside_a_bar() as ((_, _, mapping), (_, server), container):
        server.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(container.map, 0x10000, some_of(mapping))
            await trio.testing.wait_all_tasks_blocked()
            mapping.zap()
            server.gate.set()
        assert [told[0] for told in server.told] == [DMA_MAP, DMA_UNMAP, DMA_MAP]
        assert container.entries[0].present


ALL_MODES = pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)


@ALL_MODES
async def test_an_export_is_mapped_in_every_mode(mode: Mode) -> None:
    async with (
        beside_a_bar(mode) as ((owner, _, _), (_, server), container),
        exported_bar(owner, RegionIndex.BAR2, ((0x2000, 0x1000),)) as export,
    ):
        entry = await container.map(0x10000, export)
        inode = os.fstat(export.fd).st_ino
        assert server.windows == {0x10000: Believed(0x1000, 3, BAR_OFFSET + 0x2000, inode)}
        assert export.maps == 1
        await container.unmap(0x10000, 0x1000)
        assert (server.windows, export.maps, export.importers) == ({}, 0, ())
        assert not entry.mapped


@ALL_MODES
async def test_a_revoked_export_comes_back_but_for_iommufd_where_it_is_gone_for_good(mode: Mode) -> None:
    async with (
        beside_a_bar(mode) as ((owner, device, _), (_, server), container),
        exported_bar(owner, RegionIndex.BAR2) as export,
    ):
        entry = await container.map(0x10000, export)
        await set_memory(owner, False)
        assert (server.windows, entry.present, export.maps) == ({}, False, 0)
        assert device.told[-1] == (REGION_WRITE,)
        assert await refused(container.map(0x20000, export)) == ENODEV
        await set_memory(owner, True)
        assert entry.present is (mode is not Mode.IOMMUFD)
        if mode is Mode.IOMMUFD:
            assert server.windows == {}
            await container.unmap(0x10000, entry.size)
            await container.map(0x10000, export)
        assert sorted(server.windows) == [0x10000]
        assert export.maps == 1
        await container.unmap(0x10000, entry.size)


async def test_an_export_that_ends_takes_its_mappings_with_it() -> None:
    async with beside_a_bar() as ((owner, _, _), (_, server), container):
        async with exported_bar(owner, RegionIndex.BAR2) as export:
            entry = await container.map(0x10000, export)
        assert (server.windows, entry.present) == ({}, False)


async def test_iommufd_takes_an_export_of_one_range_and_type1_one_of_several() -> None:
    ranges = ((0x1000, 0x1000), (0x4000, 0x2000))
    async with (
        with_bar() as (owner, _, _),
        believing() as (session, server),
        exported_bar(owner, RegionIndex.BAR2, ranges) as export,
    ):
        async with open_container(Mode.IOMMUFD) as container:
            assert await refused(container.map(0x10000, export)) == EOPNOTSUPP
            assert export.importers == ()
        async with open_container(Mode.TYPE1V2) as container:
            await container.attach(session)
            entry = await container.map(0x10000, export)
            assert entry.size == 0x3000
            first, second = server.windows[0x10000], server.windows[0x11000]
            assert (first.size, first.offset) == (0x1000, BAR_OFFSET + 0x1000)
            assert (second.size, second.offset) == (0x2000, BAR_OFFSET + 0x4000)
            await container.unmap(0x10000, 0x3000)
            assert server.windows == {}


async def test_if_one_of_several_ranges_is_refused_the_others_are_taken_back() -> None:
    ranges = ((0x1000, 0x1000), (0x4000, 0x2000))
    async with (
        beside_a_bar() as ((owner, _, _), (session, server), container),
        exported_bar(owner, RegionIndex.BAR2, ranges) as export,
    ):
        server.refuse_window = (0x11000, 3)
        assert await refused(container.map(0x10000, export)) == EIO
        assert (server.windows, len(session.windows), export.maps, export.importers) == ({}, 0, 0, ())
        assert export.ranges == tuple(PhysVec(BAR_OFFSET + at, size) for at, size in ranges)


async def test_a_window_whose_unmapping_was_given_up_is_mapped_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ranges = ((0x1000, 0x1000), (0x4000, 0x2000))
    async with (
        beside_a_bar() as ((owner, _, _), (_, server), container),
        exported_bar(owner, RegionIndex.BAR2, ranges) as export,
    ):
        server.refuse_window = (0x11000, 3)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(container.map, 0x10000, export)
                while server.told[-1:] != [(DMA_MAP, 0x11000, 0x2000, 3)]:
                    await trio.lowlevel.checkpoint()
                gate = server.gate = trio.Event()  # before what was mapped first is unmapped
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        gate.set()
        server.refuse_window = None
        await container.map(0x10000, export)
        assert [told[0] for told in server.told].count(DMA_UNMAP) == 2
        assert sorted(server.windows) == [0x10000, 0x11000]
