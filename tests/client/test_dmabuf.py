from __future__ import annotations

import mmap
import os
import struct
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from errno import EBUSY, EINVAL, ENODEV, EOPNOTSUPP

import pytest
import trio
import trio.testing

import client
from client.dmabuf import Attachment, BarExport, DmaBufError, export_bar, exported_bar
from client.errors import BadReplyError, ClientError, ServerError
from client.phys_vec import PhysVec
from protocol.limits import MAX_DMA_BUF_RANGES, REVOKE_TIMEOUT
from protocol.vfio import Feature
from tests.client.peer import FEATURE, REGION_WRITE, RESET, FakeRegion, Message, Peer, open_fds, session_with

PAGE = 4096
BAR = 4
SIZE = 4 * PAGE
START = 2 * PAGE
"""Where the BAR begins in its file."""
GET_DMA_BUF = 1 << 16 | 11
REGIONS = {BAR: FakeRegion(SIZE, offset=START)}
MEMORY_ON, MEMORY_OFF = b"\x02\0", b"\0\0"


class Slow:
    """An importer that lets go when its test says so."""

    def __init__(self) -> None:
        self.told = 0
        self.back = 0
        self.lets_go = trio.Event()
        self.attachment: Attachment | None = None

    async def invalidate(self) -> None:
        self.told += 1
        await self.lets_go.wait()
        while self.attachment is not None and self.attachment.maps:
            self.attachment.unmap()

    async def moved(self) -> None:
        self.back += 1


class Stubborn:
    """An importer that hears what is said and does nothing."""

    def __init__(self) -> None:
        self.told = 0

    async def invalidate(self) -> None:
        self.told += 1


class Failing:
    """An importer that cannot let go, as often as it is told here."""

    def __init__(self, times: int = 1) -> None:
        self.told = 0
        self.times = times

    async def invalidate(self) -> None:
        self.told += 1
        if self.told <= self.times:
            raise RuntimeError("a mistake in the importer's code")


def quick() -> Slow:
    """One that lets go at once."""
    made = Slow()
    made.lets_go.set()
    return made


def attached(export: BarExport, importer: Slow, *, maps: int = 1) -> Attachment:
    """Its attachment, mapped."""
    importer.attachment = export.attach(importer)
    for _ in range(maps):
        importer.attachment.map()
    return importer.attachment


class FakeExporter:
    """A server that exports `fds` with every answer, whose data is `data`, or what was asked for."""

    def __init__(self, fds: Sequence[int], data: bytes | None = None, *, cut: int = 0) -> None:
        self.fds, self.data, self.cut = tuple(fds), data, cut
        self.written: list[bytes] = []
        self.asked: list[bytes] = []
        self.watch: BarExport | None = None
        self.maps_seen: list[int] = []
        self.silent = False

    async def serve(self, peer: Peer) -> None:
        try:
            while True:
                self.answer(peer, await peer.next())
        except (EOFError, ConnectionResetError):
            return

    def answer(self, peer: Peer, message: Message) -> None:
        if self.watch is not None:
            self.maps_seen.append(self.watch.maps)
        if message.command == FEATURE:
            self.asked.append(message.payload)
            _, flags = struct.unpack_from("=II", message.payload)
            assert flags == GET_DMA_BUF
            payload = message.payload[:8] + (message.payload[8:] if self.data is None else self.data)
            peer.reply(message, payload[: len(payload) - self.cut], self.fds)
        elif message.command == RESET:
            peer.reply(message)
        else:
            assert message.command == REGION_WRITE
            self.written.append(message.payload[16:])
            if not self.silent:
                peer.reply(message, message.payload[:16])


@contextmanager
def file(size: int = START + SIZE) -> Iterator[int]:
    """A BAR's file."""
    fd = os.memfd_create("bar", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    try:
        yield fd
    finally:
        os.close(fd)


@asynccontextmanager
async def session_of(
    server: FakeExporter, regions: dict[int, FakeRegion] | None = None
) -> AsyncIterator[client.Session]:
    """A session with this server."""
    capabilities = b'{"capabilities":{"max_msg_fds":8}}\0'
    made = session_with(regions=REGIONS if regions is None else regions, capabilities=capabilities)
    async with made as (session, peer), trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, peer)
        yield session
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def a_session() -> AsyncIterator[tuple[client.Session, FakeExporter]]:
    """A session with a server that exports a file of the right size; no descriptor is left."""
    before = open_fds()
    with file() as fd:
        server = FakeExporter([fd])
        async with session_of(server) as session:
            yield session, server
    assert open_fds() <= before


@asynccontextmanager
async def an_export() -> AsyncIterator[tuple[BarExport, client.Session, FakeExporter]]:
    """The export of all of a BAR."""
    async with a_session() as (session, server), exported_bar(session, BAR) as export:
        server.watch = export
        yield export, session, server


async def switch_memory(session: client.Session, command: bytes) -> None:
    await session.region_write(7, 4, command)


def refused(call: object, number: int) -> None:
    """The call is refused with this errno."""
    assert callable(call)
    with pytest.raises(DmaBufError) as refusal:
        call()
    assert refusal.value.errno == number


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
    before = open_fds()
    with file(size) as fd:
        async with session_of(FakeExporter([fd] * fds, data, cut=cut)) as session:
            held = open_fds()
            with pytest.raises(BadReplyError):
                await export_bar(session, BAR)
            assert open_fds() == held
            assert session.decoding._followers == []
    assert open_fds() <= before


async def test_a_range_beyond_the_end_of_any_file_is_not_believed() -> None:
    with file(0) as fd:
        regions = {BAR: FakeRegion(SIZE, offset=(1 << 63) - PAGE)}
        async with session_of(FakeExporter([fd]), regions) as session:
            with pytest.raises(BadReplyError, match="ends at"):
                await export_bar(session, BAR)


async def test_no_descriptor_is_left_when_nobody_waits_for_the_answer() -> None:
    with file() as fd:
        async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:
            before = open_fds()
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
        before = open_fds()
        data = said(BAR, (0, SIZE))
        assert await session.feature_get(Feature.DMA_BUF, data, room=len(data)) == data
        assert open_fds() == before


async def test_a_descriptor_with_another_feature_makes_no_sense() -> None:
    with file() as fd:
        async with session_with(regions=REGIONS) as (session, peer), trio.open_nursery() as nursery:
            before = open_fds()

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


# --- revocation


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
