"""The whole engine, real library and all, against a client that shares no code with it."""

import errno
import logging
import mmap
import os
import resource
import socket
import stat
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from device.errors import DeviceError
from device.function import Identity, MemoryBar, PciFunction, ResetKind
from server import SessionLimits
from server.libvfio_user import Library, LibraryError, Limit, serve
from tests.descriptors import open_fds, settled_fds
from tests.peers.engines import generation
from tests.server.raw import (
    CONFIG,
    DMA_MAP,
    DMA_UNMAP,
    ERR,
    EVENTFD,
    GET_INFO,
    GET_IO_FDS,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    INTX,
    MSI,
    MSIX,
    NO_REPLY,
    NONE,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    TRIGGER,
    UNMASK,
    RawClient,
    access,
    dma,
    irqs,
    message,
    version,
)
from tests.server.world import BAR2_SIZE, PAGE, VECTORS, Card, World, world

INFO = struct.pack("=IIII", 16, 0, 0, 0)
COMMAND = 4
MSI_ENABLE = 1
MSIX_ENABLE = 0x8000


def memory(size: int = 4 * PAGE) -> int:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def capability(world: World, number: int) -> int:
    return next(part.offset for part in world.function.capabilities if number == part.ID)


async def enable(world: World, client: RawClient, number: int, bits: int) -> None:
    """Write the control word of the MSI or MSI-X capability, as a driver does."""
    await client.write(CONFIG, capability(world, number) + 2, struct.pack("=H", bits))


async def wire(client: RawClient, kind: int, count: int, start: int = 0) -> list[int]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, kind, start, count), fds)
    return fds


async def signalled(fd: int) -> int:
    with trio.fail_after(5):
        await trio.lowlevel.wait_readable(fd)
    return os.eventfd_read(fd)


def quiet(fd: int) -> bool:
    try:
        os.eventfd_read(fd)
    except BlockingIOError:
        return True
    return False


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@asynccontextmanager
async def two_cards(
    folder: Path, library: Library, limits: SessionLimits | None = None
) -> AsyncIterator[list[World]]:
    """Two cards that one server serves."""
    async with AsyncExitStack() as clients, trio.open_nursery() as nursery:
        cards = [Card("a"), Card("b")]
        worlds = [World(folder / card.function.name, card, card.function, clients) for card in cards]
        places = [(one.function, one.path) for one in worlds]
        await nursery.start(partial(serve, places, library=library, limits=limits))
        yield worlds
        nursery.cancel_scope.cancel()
    for card in cards:
        card.function.close()


# --- what the client sees of the function


async def test_a_version_is_agreed_on_and_what_follows_at_once_is_answered(served: World) -> None:
    client = await served.connect()
    await client.send(version() + message(GET_INFO, INFO, message_id=7))
    for expected in (1, 7):
        reply = await client.receive()
        assert reply is not None
        assert reply.message_id == expected


async def test_regions_have_size_and_access_of_the_functions(client: RawClient) -> None:
    sizes = {}
    for index in range(9):
        reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        _, flags, _, _, size, _ = reply.unpack("IIIIQQ")
        sizes[index] = (size, flags & 3)
        reply.close()
    assert sizes == {0: (PAGE, 3), 2: (BAR2_SIZE, 3), 7: (PAGE, 3)} | dict.fromkeys(
        (1, 3, 4, 5, 6, 8), (0, 0)
    )


async def test_memory_is_mapped_by_the_client(client: RawClient, served: World) -> None:
    reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 4096, 0, 2, 0, 0, 0))
    _, flags, _, offset, size, _ = reply.unpack("IIIIQQ")
    assert flags & 0xC == 0xC  # mappable, with capabilities
    identity, _, _, areas, _, start, length = struct.unpack_from("=HHIIIQQ", reply.payload, offset)
    assert (identity, areas, start, length) == (1, 1, 0, size)
    with mmap.mmap(reply.fds[0], size) as mapped:
        mapped[100:104] = b"host"
        assert served.card.memory.read(100, 4) == b"host"
        assert await client.read(2, 100, 4) == b"host"
    reply.close()


async def test_accesses_reach_the_function(client: RawClient, served: World) -> None:
    assert struct.unpack("=HH", await client.read(CONFIG, 0, 4)) == (0x1AF4, 0x1041)
    assert await client.read(0, 4, 4) == struct.pack("=I", 0x1234567C)
    await client.write(0, 8, b"\1\2")
    await client.send(message(REGION_WRITE, access(12, 0, 4) + b"post", flags=NO_REPLY))
    await client.write(CONFIG, COMMAND, b"\6\0")
    assert served.card.registers.written == [(8, 2, 0x201), (12, 4, 0x74736F70)]
    assert served.function.bus_master


async def test_refusals_carry_the_functions_errno_and_mistakes_are_eio(
    client: RawClient, served: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused(command: int, payload: bytes) -> int:
        await client.send(message(command, payload))
        reply = await client.receive()
        assert reply is not None
        return reply.error  # with a payload: Limit.ERROR_PAYLOAD

    assert await refused(REGION_READ, access(PAGE - 2, 0, 4)) == errno.EINVAL
    assert await refused(REGION_READ, access(0, 1, 4)) == errno.EINVAL
    served.card.registers.broken = True
    assert await refused(REGION_READ, access(0, 0, 4)) == errno.EIO
    assert await refused(REGION_WRITE, access(0, 0, 4) + bytes(4)) == errno.EIO
    assert [record.exc_info for record in caplog.records if "callback failed" in record.message]
    served.card.registers.broken = False
    assert len(await client.read(0, 0, 4)) == 4


async def test_a_reset_reaches_the_function(client: RawClient, served: World) -> None:
    await client.write(CONFIG, COMMAND, b"\6\0")
    await client.do(RESET)
    assert served.card.resets == [ResetKind.DEVICE]
    assert await client.read(CONFIG, COMMAND, 2) == b"\0\0"


@pytest.mark.needs_no(Limit.IO_EVENTFDS)
async def test_a_region_without_doorbells_names_none(client: RawClient) -> None:
    reply = await client.do(GET_IO_FDS, struct.pack("=IIII", 4096, 0, 0, 0))
    assert reply.unpack("IIII") == (16, 0, 0, 0)


# --- memory of the client


async def test_windows_come_and_go(client: RawClient, served: World) -> None:
    fd = memory()
    os.pwrite(fd, b"there", PAGE)
    await client.do(DMA_MAP, dma(0x10000, 2 * PAGE, offset=PAGE), [fd])
    assert served.function.dma.read(0x10000, 5) == b"there"
    served.function.dma.write(0x10000 + PAGE, b"back")
    assert os.pread(fd, 4, 2 * PAGE) == b"back"
    await client.do(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0x10000, 2 * PAGE))
    assert served.function.dma.windows() == []
    os.close(fd)


async def test_all_windows_go_at_once(client: RawClient, served: World) -> None:
    fd = memory()
    for number in range(4):
        await client.do(DMA_MAP, dma(0x10000 * number, PAGE), [fd])
    assert len(served.function.dma) == 4
    await client.do(DMA_UNMAP, struct.pack("=IIQQ", 24, 2, 0, 0))
    assert len(served.function.dma) == 0
    os.close(fd)


async def test_the_same_window_again_is_refused_and_costs_no_descriptor(client: RawClient) -> None:
    fd = memory()
    await client.do(DMA_MAP, dma(0, PAGE), [fd])
    before = settled_fds()
    assert await client.refused(DMA_MAP, dma(0, PAGE), [fd]) == errno.EEXIST
    assert open_fds() == before
    os.close(fd)


async def test_what_the_client_truncates_is_not_read(client: RawClient, served: World) -> None:
    fd = memory()
    await client.do(DMA_MAP, dma(0, PAGE), [fd])
    os.ftruncate(fd, 0)
    with pytest.raises(DeviceError) as refused:
        served.function.dma.read(0, 4)
    assert refused.value.errno == errno.EFAULT
    os.close(fd)


@pytest.mark.shows(Limit.DMA_WINDOWS)
async def test_there_are_sixteen_windows_at_most(client: RawClient) -> None:
    fd = memory()
    for number in range(16):
        await client.do(DMA_MAP, dma(PAGE * number, PAGE), [fd])
    assert await client.refused(DMA_MAP, dma(PAGE * 16, PAGE), [fd]) == errno.EINVAL
    os.close(fd)


@pytest.mark.needs_no(Limit.DMA_WINDOWS)
async def test_there_may_be_more_than_sixteen_windows(client: RawClient, served: World) -> None:
    fd = memory()
    for number in range(100):
        await client.do(DMA_MAP, dma(PAGE * number, PAGE), [fd])
    assert len(served.function.dma) == 100
    os.close(fd)


@pytest.mark.shows(Limit.UNKNOWN_UNMAPS)
async def test_what_is_not_mapped_cannot_be_unmapped(client: RawClient) -> None:
    assert await client.refused(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0x10000, PAGE)) == errno.ENOENT


@pytest.mark.shows(Limit.MESSAGE_DMA)
async def test_memory_without_a_descriptor_is_out_of_reach(client: RawClient, served: World) -> None:
    await client.do(DMA_MAP, dma(0, PAGE))
    with pytest.raises(OSError, match="DMA read") as caught:
        served.function.dma.read(0, 4)
    assert caught.value.errno == errno.EFAULT


# --- interrupts


async def test_msix_vectors_reach_their_eventfds(client: RawClient, served: World) -> None:
    await enable(served, client, 0x11, MSIX_ENABLE)
    fds = await wire(client, MSIX, VECTORS)
    for number in range(VECTORS):
        served.function.interrupts.signal(number)
        assert await signalled(fds[number]) == 1
        assert all(quiet(fd) for fd in fds)
    close_all(fds)


async def test_msi_reaches_its_eventfd(client: RawClient, served: World) -> None:
    await enable(served, client, 0x05, MSI_ENABLE)
    fds = await wire(client, MSI, 1)
    served.function.interrupts.signal(0)
    assert await signalled(fds[0]) == 1
    close_all(fds)


async def test_intx_is_signalled_again_when_the_client_unmasks_it(client: RawClient, served: World) -> None:
    (fd,) = await wire(client, INTX, 1)
    served.function.interrupts.intx(True)
    assert await signalled(fd) == 1
    served.function.interrupts.intx(True)
    await client.do(SET_IRQS, irqs(NONE | UNMASK, INTX, 0, 1))
    assert await signalled(fd) == 1
    served.function.interrupts.intx(False)
    await client.do(SET_IRQS, irqs(NONE | UNMASK, INTX, 0, 1))
    await client.read(CONFIG, 0, 4)
    assert quiet(fd)
    os.close(fd)


async def test_an_interrupt_waits_for_its_eventfd(client: RawClient, served: World) -> None:
    await enable(served, client, 0x11, MSIX_ENABLE)
    served.function.interrupts.signal(2)
    await client.read(CONFIG, 0, 4)
    fds = await wire(client, MSIX, VECTORS)
    await client.read(CONFIG, 0, 4)
    assert await signalled(fds[2]) == 1
    assert all(quiet(fd) for fd in fds)
    close_all(fds)


async def test_intx_that_went_low_before_it_was_wired_is_forgotten(client: RawClient, served: World) -> None:
    served.function.interrupts.intx(True)
    await trio.testing.wait_all_tasks_blocked()
    served.function.interrupts.intx(False)
    (fd,) = await wire(client, INTX, 1)
    await client.read(CONFIG, 0, 4)
    assert quiet(fd)
    served.function.interrupts.intx(True)
    assert await signalled(fd) == 1
    os.close(fd)


async def test_an_interrupt_of_one_kind_is_none_of_the_next(client: RawClient, served: World) -> None:
    served.function.interrupts.intx(True)
    await enable(served, client, 0x11, MSIX_ENABLE)
    fds = await wire(client, MSIX, VECTORS)
    await client.read(CONFIG, 0, 4)
    assert all(quiet(fd) for fd in fds)
    close_all(fds)


async def test_the_clients_masks_hold(client: RawClient, served: World) -> None:
    await enable(served, client, 0x11, MSIX_ENABLE)
    fds = await wire(client, MSIX, VECTORS)
    await client.do(SET_IRQS, irqs(NONE | 8, MSIX, 1, 1))
    served.function.interrupts.signal(1)
    served.function.interrupts.signal(0)
    assert await signalled(fds[0]) == 1
    assert quiet(fds[1])
    await client.do(SET_IRQS, irqs(NONE | UNMASK, MSIX, 1, 1))
    assert await signalled(fds[1]) == 1
    close_all(fds)


async def test_a_range_of_interrupts_that_wraps_is_refused(client: RawClient) -> None:
    assert await client.refused(SET_IRQS, irqs(NONE | TRIGGER, MSIX, 1, 0xFFFF_FFFF)) == errno.EINVAL
    assert len(await client.read(CONFIG, 0, 4)) == 4


async def test_an_eventfd_to_unmask_is_refused_and_closed(client: RawClient) -> None:
    await client.read(CONFIG, 0, 4)
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    before = settled_fds()
    assert await client.refused(SET_IRQS, irqs(EVENTFD | UNMASK, INTX, 0, 1), [fd]) == errno.ENOTTY
    assert open_fds() == before
    os.close(fd)


async def test_indexes_have_the_functions_counts(client: RawClient, served: World) -> None:
    counts = []
    for index in range(5):
        reply = await client.do(GET_IRQ_INFO, struct.pack("=IIII", 16, 0, index, 0))
        _, flags, _, count = reply.unpack("IIII")
        assert flags == 1  # Limit.IRQ_FLAGS
        counts.append(count)
    assert counts[:ERR] == [irq.count for irq in served.function.irqs()][:ERR]


# --- clients that come, go and dawdle


async def test_a_client_that_leaves_takes_everything_with_it(served: World) -> None:
    client = await served.client()
    fd = memory()
    await client.do(DMA_MAP, dma(0, PAGE), [fd])
    os.close(fd)
    await enable(served, client, 0x11, MSIX_ENABLE)
    close_all(await wire(client, MSIX, VECTORS))
    old = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 4096, 0, 2, 0, 0, 0))
    client.close()
    following = await served.client()
    assert served.card.resets == [ResetKind.LOST_CLIENT]
    assert len(served.function.dma) == 0
    assert not served.function.interrupts.msix.enabled
    with mmap.mmap(old.fds[0], BAR2_SIZE) as mapped:
        mapped[0:4] = b"left"
    old.close()
    assert await following.read(2, 0, 4) == bytes(4)
    new = await following.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 4096, 0, 2, 0, 0, 0))
    assert os.fstat(new.fds[0]).st_ino == os.fstat(served.card.memory.fd).st_ino
    new.close()


async def test_ten_clients_leave_no_descriptor(served: World) -> None:
    before = len(settled_fds())
    for _ in range(10):
        client = await served.client()
        await client.read(CONFIG, 0, 4)
        client.close()
        with trio.fail_after(5):
            while len(open_fds()) != before:
                await trio.testing.wait_all_tasks_blocked()
    assert served.card.resets == [ResetKind.LOST_CLIENT] * 10


async def test_the_socket_is_the_owners_alone(served: World) -> None:
    status = os.stat(served.path)  # noqa: PTH116
    assert stat.S_IMODE(status.st_mode) == 0o600


async def test_a_silent_client_stops_neither_other_cards_nor_the_next_client(
    tmp_path: Path, library: Library
) -> None:
    limits = SessionLimits(version_deadline=0.2)
    async with two_cards(tmp_path, library, limits) as (silenced, other):
        silent = await silenced.connect()
        talking = await other.client()
        assert len(await talking.read(CONFIG, 0, 4)) == 4
        waiting = await silenced.connect()
        assert await silent.hung_up()
        await waiting.negotiate()
        assert len(await waiting.read(CONFIG, 0, 4)) == 4
        assert silenced.card.resets == []


async def test_a_client_that_stops_within_a_message_stops_nobody(tmp_path: Path, library: Library) -> None:
    async with two_cards(tmp_path, library) as (stopped, other):
        stopping, talking = await stopped.client(), await other.client()
        for whole in (
            message(REGION_WRITE, access(0, 0, 4) + b"part"),
            message(SET_IRQS, irqs(NONE | TRIGGER, MSIX, 0, 0)),
        ):
            for end in (5, 16, 20, len(whole) - 1):
                await stopping.send(whole[:end])
                assert len(await talking.read(CONFIG, 0, 4)) == 4
                await stopping.send(whole[end:])
                reply = await stopping.receive()
                assert reply is not None
                assert reply.error == 0
        assert len(stopped.card.registers.written) == 4


async def test_a_part_of_a_message_is_not_waited_for_without_end(
    served: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.libvfio_user._session._REST_DEADLINE", 0.05)
    for part in (message(GET_INFO, INFO)[:7], message(GET_INFO, INFO)[:-1]):
        client = await served.client()
        await client.send(part)
        assert await client.hung_up()


async def test_a_client_that_leaves_within_a_message_is_not_waited_for(served: World) -> None:
    for end in (7, 20):
        client = await served.client()
        await client.send(message(GET_INFO, INFO)[:end])
        client.close()
    with trio.fail_after(2):
        assert len(await (await served.client()).read(CONFIG, 0, 4)) == 4


async def test_a_client_that_reads_no_replies_is_dropped_and_stops_nobody(
    tmp_path: Path, library: Library
) -> None:
    async with two_cards(tmp_path, library, SessionLimits(send_deadline=0.2)) as (full, other):
        deaf, talking = await full.client(), await other.client()
        request = message(REGION_READ, access(0, CONFIG, 256))
        deaf.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with trio.move_on_after(0.1):
            for _ in range(5000):
                await deaf.send(request)
        assert len(await talking.read(CONFIG, 0, 4)) == 4
        with trio.fail_after(10):
            while full.card.resets != [ResetKind.LOST_CLIENT]:
                await trio.testing.wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize(
    "first",
    [message(GET_INFO, INFO), version(major=1), message(1, struct.pack("=HH", 0, 1) + b"{"), bytes(16)],
)
async def test_a_client_that_does_not_come_to_terms_is_let_go(served: World, first: bytes) -> None:
    client = await served.connect()
    await client.send(first)
    reply = await client.receive()
    if reply is not None:
        assert reply.error == errno.EINVAL
        assert await client.hung_up()
    assert served.card.resets == []
    assert len(await (await served.client()).read(CONFIG, 0, 4)) == 4


async def test_a_version_in_parts_with_descriptors_is_agreed_on(served: World) -> None:
    client = await served.connect()
    whole = version()
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    before = len(settled_fds())
    for part in (whole[:3], whole[3:16], whole[16:30], whole[30:]):
        await client.send(part, [fd])
    reply = await client.receive()
    assert reply is not None
    assert reply.error == 0
    assert len(await client.read(CONFIG, 0, 4)) == 4
    client.close()
    with trio.fail_after(5):
        while len(open_fds()) >= before:  # the client's own is gone as well
            await trio.testing.wait_all_tasks_blocked()
    os.close(fd)


async def test_a_card_without_free_descriptors_lets_the_client_go_and_recovers(
    served: World, caplog: pytest.LogCaptureFixture
) -> None:
    client = await served.connect()
    await trio.testing.wait_all_tasks_blocked()
    taken = len(open_fds())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for spare in range(12):
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + spare, hard))
        try:
            await client.send(version())
            reply = await client.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if reply is not None and not reply.error and spare > 9:
            break
        client.close()
        client = await served.connect()
        await trio.testing.wait_all_tasks_blocked()
    client.close()
    assert len(await (await served.client()).read(CONFIG, 0, 4)) == 4


async def test_a_reply_nobody_asked_for_ends_the_session(served: World) -> None:
    client = await served.client()
    await client.send(message(REGION_READ, access(0, 0, 4), flags=1))
    assert await client.hung_up()


async def test_log_entries_about_a_client_are_limited(
    tmp_path: Path, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    limits = SessionLimits(tellings=3)
    async with world(tmp_path, by=partial(serve, library=library), limits=limits) as served:
        client = await served.client()
        for _ in range(10):
            assert await client.refused(77, bytes(8)) == errno.EINVAL
    told = [record.message for record in caplog.records]
    assert len(told) == 4
    assert told[-1].endswith("no more of this client is told")


async def test_a_message_is_looked_for_while_the_card_spins(tmp_path: Path, library: Library) -> None:
    async with world(tmp_path, by=partial(serve, library=library), poll_us=200) as served:
        client = await served.client()
        for _ in range(10):
            assert len(await client.read(CONFIG, 0, 4)) == 4


# --- what the library cannot serve


@pytest.mark.shows(Limit.REGION_SIZE)
async def test_a_bar_that_is_too_large_is_refused_before_anything_is_served(
    tmp_path: Path, library: Library
) -> None:
    function = PciFunction("large", Identity(0x1AF4, 0x1041, 0, 0), bars=[MemoryBar(2, 1 << 32)])
    with pytest.raises(LibraryError, match="a BAR is smaller than 4 GiB"):
        await serve([(function, tmp_path / "card.sock")], library=library)
    function.close()


@pytest.mark.needs_no(Limit.DEVICE_FEATURE)
async def test_features_are_refused_where_the_function_cannot_move(client: RawClient) -> None:
    assert await client.refused(16, struct.pack("=II", 8, 1 << 18 | 1)) == errno.EINVAL


def test_the_generation_is_the_one_that_the_limits_are_for(library: Library) -> None:
    assert library.generation is generation()
