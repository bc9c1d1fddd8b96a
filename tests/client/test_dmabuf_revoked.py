"""An export while its device does not answer, before and after."""

from __future__ import annotations

import os
from errno import ENODEV

import pytest
import trio
import trio.testing

import client
from client.dmabuf import BarExport, exported_bar
from protocol.vfio import RegionIndex
from tests.client.exporter import (
    BAR,
    MEMORY_OFF,
    MEMORY_ON,
    START,
    Failing,
    Slow,
    Stubborn,
    a_session,
    an_export,
    attached,
    quick,
    refused,
    switch_memory,
)


class SlowToCome(Slow):
    """An importer that lets go at once, and takes his time to come back."""

    def __init__(self) -> None:
        super().__init__()
        self.lets_go.set()
        self.comes = trio.Event()

    async def moved(self) -> None:
        await self.comes.wait()
        self.back += 1


async def test_an_export_while_memory_is_off_is_revoked_from_birth() -> None:
    async with a_session() as (session, _):
        await switch_memory(session, MEMORY_OFF)
        async with exported_bar(session, BAR) as export:
            assert export.revoked
            refused(lambda: export.attach(quick()), ENODEV)
            await switch_memory(session, MEMORY_ON)
            assert not export.revoked
            attachment = export.attach(quick())
            attachment.map()
            attachment.unmap()


async def test_one_that_is_revoked_from_birth_by_a_posted_write_comes_back_alike() -> None:
    async with a_session() as (session, _):
        session.post_write_now(RegionIndex.CONFIG, 4, MEMORY_OFF)
        async with exported_bar(session, BAR) as export:
            assert export.revoked
            with pytest.raises(client.ClientError, match="must not switch"):
                session.post_write_now(RegionIndex.CONFIG, 4, MEMORY_ON)
            await switch_memory(session, MEMORY_ON)
            assert not export.revoked


@pytest.mark.parametrize("reset", [False, True], ids=["COMMAND", "DEVICE_RESET"])
async def test_nobody_has_it_mapped_when_the_device_stops_to_answer(*, reset: bool) -> None:
    async with an_export() as (export, session, server):
        importers = [quick() for _ in range(3)]
        for number, importer in enumerate(importers):
            attached(export, importer, maps=number + 1)
        await (session.reset() if reset else switch_memory(session, MEMORY_OFF))
        assert server.maps_seen == [0]
        assert [importer.told for importer in importers] == [1, 1, 1]
        assert export.revoked
        assert importers[0].attachment is not None
        refused(importers[0].attachment.map, ENODEV)


async def test_revoke_waits_for_a_slow_importer(autojump_clock: trio.testing.MockClock) -> None:
    async with an_export() as (export, _, _):
        slow = Slow()
        attached(export, slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(export.revoke)
            await trio.sleep(3600)
            assert export.maps == 1
            slow.lets_go.set()
        assert export.maps == 0


async def test_revoke_waits_for_one_who_unmaps_after_he_was_told() -> None:
    async with an_export() as (export, _, _):
        attachment = export.attach(Stubborn())
        attachment.map()
        attachment.map()
        done = trio.Event()

        async def revoke() -> None:
            await export.revoke()
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(revoke)
            await trio.testing.wait_all_tasks_blocked()
            attachment.unmap()
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
            attachment.unmap()
        attachment.detach()


async def test_a_revoke_that_is_given_up_forgets_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with an_export() as (export, session, server):
        slow, stubborn, soon = Slow(), Stubborn(), quick()
        attached(export, slow, maps=2)
        attached(export, soon)
        attachment = export.attach(stubborn)
        attachment.map()
        for times in (1, 2):
            with trio.move_on_after(1) as scope:
                await switch_memory(session, MEMORY_OFF)
            assert scope.cancelled_caught
            assert export.revoked
            assert export.maps == 3
            # Who has heard it whole is not told again; who was interrupted is.
            assert (slow.told, stubborn.told, soon.told) == (times, 1, 1)
        assert server.written == []
        slow.lets_go.set()
        with trio.move_on_after(1):
            await switch_memory(session, MEMORY_OFF)
        assert (export.maps, server.written) == (1, [])
        attachment.unmap()
        await switch_memory(session, MEMORY_OFF)
        assert server.written == [MEMORY_OFF]
        assert server.maps_seen == [0]
        assert (slow.told, stubborn.told, soon.told) == (3, 1, 1)


async def test_a_revoke_cancelled_before_it_began_stands_all_the_same() -> None:
    async with an_export() as (export, _, _):
        with trio.CancelScope() as scope:
            scope.cancel()
            await export.revoke()
        assert export.revoked


async def test_revoked_twice_is_revoked_once() -> None:
    async with an_export() as (export, _, _):
        importer = quick()
        attached(export, importer)
        await export.revoke()
        await export.revoke()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(export.revoke)
            nursery.start_soon(export.revoke)
        assert importer.told == 1


async def test_two_who_revoke_at_once_both_wait_for_the_last_map() -> None:
    async with an_export() as (export, _, _):
        slow = Slow()
        attached(export, slow)
        done: list[int] = []

        async def revoke(number: int) -> None:
            await export.revoke()
            done.append(export.maps)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(revoke, 1)
            nursery.start_soon(revoke, 2)
            await trio.testing.wait_all_tasks_blocked()
            assert done == []
            slow.lets_go.set()
        assert (done, slow.told) == ([0, 0], 1)


async def test_who_revokes_last_is_obeyed() -> None:
    class Hesitant(Stubborn):
        def __init__(self) -> None:
            super().__init__()
            self.comes_back = trio.Event()

        async def moved(self) -> None:
            await self.comes_back.wait()

    async with an_export() as (export, _, _):
        importer = Hesitant()
        export.attach(importer)
        await export.revoke()
        async with trio.open_nursery() as nursery:
            for change in (export.restore, export.restore, export.revoke):
                nursery.start_soon(change)
                await trio.testing.wait_all_tasks_blocked()
            importer.comes_back.set()
        assert export.revoked
        assert importer.told == 2


async def test_mapped_again_after_it_was_revoked_it_has_the_same_data() -> None:
    async with an_export() as (export, session, server):
        importer = quick()
        attachment = attached(export, importer)
        os.pwrite(server.fds[0], b"the same", START)
        before = os.pread(export.fd, 8, attachment.map()[0].paddr)
        await switch_memory(session, MEMORY_OFF)
        refused(attachment.map, ENODEV)
        await switch_memory(session, MEMORY_ON)
        assert importer.back == 1
        (again,) = attachment.map()
        assert os.pread(export.fd, 8, again.paddr) == before == b"the same"
        await switch_memory(session, MEMORY_OFF)
        assert (importer.told, export.maps) == (2, 0)


async def test_one_who_did_not_wait_until_memory_is_on_leaves_importers_to_the_next(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with an_export() as (export, session, server):
        importer = quick()
        attached(export, importer)
        await switch_memory(session, MEMORY_OFF)
        server.silent = True
        with trio.move_on_after(1):
            await switch_memory(session, MEMORY_ON)
        assert export.revoked
        server.silent = False
        await switch_memory(session, MEMORY_ON)
        assert not export.revoked
        assert importer.back == 1


async def test_one_who_gave_up_switching_memory_off_can_switch_it_on() -> None:
    async with an_export() as (export, session, server):
        attachment = export.attach(Stubborn())
        attachment.map()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(switch_memory, session, MEMORY_OFF)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert (export.revoked, server.written) == (True, [])
        await switch_memory(session, MEMORY_ON)
        assert not export.revoked
        attachment.unmap()


async def test_one_who_was_not_told_that_it_is_back_is_told_by_the_next() -> None:
    async with an_export() as (export, session, _):
        slow, other = SlowToCome(), quick()
        attached(export, slow)
        attached(export, other)
        await switch_memory(session, MEMORY_OFF)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(switch_memory, session, MEMORY_ON)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        slow.comes.set()
        await switch_memory(session, MEMORY_ON)
        assert (slow.back, other.back) == (1, 1)


async def test_one_who_leaves_meanwhile_hears_nothing() -> None:
    async with an_export() as (export, session, _):
        slow = SlowToCome()
        attachment = attached(export, slow)
        await switch_memory(session, MEMORY_OFF)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(switch_memory, session, MEMORY_ON)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        attachment.detach()
        slow.comes.set()
        await switch_memory(session, MEMORY_ON)
        assert slow.back == 0


async def test_nothing_is_restored_while_the_device_does_not_answer() -> None:
    async with an_export() as (export, session, _):
        await switch_memory(session, MEMORY_OFF)
        await export.restore()
        assert export.revoked
        await switch_memory(session, MEMORY_ON)
        await export.restore()
        assert not export.revoked


async def test_importers_that_fail_or_hang_do_not_keep_others_from_letting_go() -> None:
    async with an_export() as (export, _, _):
        failing, hanging, good = Failing(), Slow(), quick()
        bad = export.attach(failing)
        bad.map()
        attached(export, hanging)
        attached(export, good)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_revoke_with_failures, export)
            await trio.testing.wait_all_tasks_blocked()
            assert (failing.told, hanging.told, good.told) == (1, 1, 1)
            assert export.maps == 2
            hanging.lets_go.set()
        assert export.maps == 1  # and it was not waited for
        bad.unmap()
        await export.revoke()
        assert (failing.told, hanging.told, good.told) == (2, 1, 1)


async def _revoke_with_failures(export: BarExport) -> None:
    with pytest.raises(ExceptionGroup) as group:
        await export.revoke()
    assert [str(error) for error in group.value.exceptions] == ["a mistake in the importer's code"]


async def test_one_who_fails_and_holds_nothing_is_told_once() -> None:
    async with an_export() as (export, _, _):
        failing = Failing()
        export.attach(failing)
        await _revoke_with_failures(export)
        await export.revoke()
        assert failing.told == 1


async def test_a_device_whose_bar_is_held_by_one_who_fails_goes_on_answering() -> None:
    async with an_export() as (export, session, server):
        bad = export.attach(Failing())
        bad.map()
        with pytest.raises(ExceptionGroup):
            await switch_memory(session, MEMORY_OFF)
        assert server.written == []
        bad.unmap()
        await switch_memory(session, MEMORY_OFF)
        assert server.written == [MEMORY_OFF]
