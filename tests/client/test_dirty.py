from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import EINVAL

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

import client
from client.dirty import DirtyBitmap, DirtyLog
from client.windows import Window
from protocol import LocalProtocolError
from protocol.limits import MAX_LOGGED_RANGES, MAX_REPORT
from protocol.vfio import DmaMapFlags
from tests.client.peer import DMA_MAP, DMA_UNMAP, FEATURE, Message, Peer, session_with

PAGE = 4096
GET, SET = 1 << 16, 1 << 17
START, STOP, REPORT = 6, 7, 8
LARGE = b'{"capabilities":{"max_msg_fds":8}}\0'


def bits(*pages: int, count: int) -> bytes:
    """A bitmap of so many pages with these dirty."""
    words = [0] * -(-count // 64)
    for page in pages:
        words[page // 64] |= 1 << page % 64
    return struct.pack(f"={len(words)}Q", *words)


class FakeLog:
    """A server's log: says what it is told to, and remembers what it was asked."""

    def __init__(self, report: Callable[[int, int, int], bytes], chosen: int = PAGE) -> None:
        self.report, self.chosen = report, chosen
        self.asked: list[bytes] = []

    async def serve(self, peer: Peer) -> None:
        try:
            while True:
                self.answer(peer, await peer.expect(FEATURE))
        except EOFError:
            return

    def answer(self, peer: Peer, message: Message) -> None:
        argsz, flags = struct.unpack_from("=II", message.payload)
        data = message.payload[8:]
        self.asked.append(data)
        if flags == SET | START:
            peer.reply(message, message.payload[:8] + struct.pack("=Q", self.chosen) + data[8:])
        elif flags == SET | STOP:
            assert data == b""
            peer.reply(message, message.payload)
        else:
            assert flags == GET | REPORT
            iova, length, page_size = struct.unpack("=QQQ", data)
            report = data + self.report(iova, length, page_size)
            assert argsz == 8 + 24 + -(-length // page_size // 64) * 8
            peer.reply(message, struct.pack("=II", 8 + len(report), flags) + report)


@asynccontextmanager
async def logging(log: FakeLog, capabilities: bytes = LARGE) -> AsyncIterator[client.Session]:
    """A session with a server that keeps this log."""
    with trio.fail_after(10):
        async with session_with(capabilities=capabilities) as (session, peer), trio.open_nursery() as nursery:
            nursery.start_soon(log.serve, peer)
            yield session
            nursery.cancel_scope.cancel()


async def test_a_log_is_started_reported_and_stopped() -> None:
    device = FakeLog(lambda iova, length, page_size: bits(0, 3, 64, count=100))
    async with logging(device) as session:
        log = DirtyLog(session)
        assert await log.start(PAGE, [(0x10000, 0x100000), (0x200000, PAGE)]) == PAGE
        bitmap = await log.report(0x10000, 100 * PAGE)
        assert list(bitmap.pages()) == [0x10000, 0x13000, 0x10000 + 64 * PAGE]
        assert bitmap.count() == 3
        await log.stop()
    assert device.asked == [
        struct.pack("=QIIQQQQ", PAGE, 2, 0, 0x10000, 0x100000, 0x200000, PAGE),
        struct.pack("=QQQ", 0x10000, 100 * PAGE, PAGE),
        b"",
    ]


async def test_the_device_chooses_the_page_size() -> None:
    async with logging(FakeLog(lambda *_: b"", chosen=1 << 16)) as session:
        assert await DirtyLog(session).start() == 1 << 16


@pytest.mark.parametrize("chosen", [0, 3, 4097])
async def test_a_page_size_that_cannot_be_is_an_error(chosen: int) -> None:
    async with logging(FakeLog(lambda *_: b"", chosen=chosen)) as session:
        with pytest.raises(client.BadReplyError, match="pages of"):
            await DirtyLog(session).start()


async def test_a_long_report_is_asked_for_in_pieces() -> None:
    pages = MAX_REPORT * 8 + 70

    def report(iova: int, length: int, page_size: int) -> bytes:
        count = length // page_size
        return bits(0, count - 1, count=count)

    device = FakeLog(report)
    async with logging(device) as session:
        bitmap = await DirtyLog(session).report(0, pages * PAGE)
    assert [page // PAGE for page in bitmap.pages()] == [
        0,
        MAX_REPORT * 8 - 1,
        MAX_REPORT * 8,
        pages - 1,
    ]
    assert len(device.asked) == 2


async def test_a_report_is_no_longer_than_the_server_sends() -> None:
    device = FakeLog(lambda iova, length, page_size: bits(count=length // page_size))
    small = b'{"capabilities":{"max_data_xfer_size":20}}\0'
    async with logging(device, small) as session:
        await DirtyLog(session).report(0, 300 * PAGE)
    assert [struct.unpack("=QQQ", asked)[1] // PAGE for asked in device.asked] == [128, 128, 44]


@pytest.mark.parametrize(
    "answer",
    [bits(10, count=64), bits(count=128), bits(63, count=64), b""],
    ids=["after the end", "too long", "last", "none"],
)
async def test_a_bitmap_that_cannot_be_is_an_error(answer: bytes) -> None:
    async with logging(FakeLog(lambda *_: answer)) as session:
        with pytest.raises(client.BadReplyError, match="DEVICE_FEATURE"):
            await DirtyLog(session).report(0, 10 * PAGE)


@pytest.mark.parametrize(
    ("iova", "length", "page_size"),
    [(1, PAGE, PAGE), (0, PAGE + 1, PAGE), (0, 0, PAGE), (0, 96, 48), (0, PAGE, 0), (0, PAGE, -1)],
)
async def test_what_is_not_made_of_pages_is_not_asked_for(iova: int, length: int, page_size: int) -> None:
    async with session_with() as (session, _):
        with pytest.raises(client.ClientError, match="pages"):
            await DirtyLog(session).report(iova, length, page_size)
        with pytest.raises(client.ClientError, match="pages"):
            await DirtyLog(session).unmap(iova, length, page_size)


async def test_no_more_ranges_are_logged_than_a_server_takes() -> None:
    async with logging(FakeLog(lambda *_: b"")) as session:
        log = DirtyLog(session)
        await log.start(PAGE, [(0, PAGE)] * MAX_LOGGED_RANGES)
        with pytest.raises(client.ClientError, match="ranges"):
            await log.start(PAGE, [(0, PAGE)] * (MAX_LOGGED_RANGES + 1))


async def test_what_the_device_writes_by_message_is_logged_here() -> None:
    device = FakeLog(lambda iova, length, page_size: bits(0, count=length // page_size))
    async with logging(device) as session:
        memory = memoryview(bytearray(16 * PAGE))
        session.windows.add(Window(0x10000, len(memory), DmaMapFlags.WRITE, memory))
        session.windows.write(0x14000, b"before")
        log = DirtyLog(session)
        await log.start()
        session.windows.write(0x12FFF, b"ab")
        session.windows.write(0x1A000, b"c")
        assert list((await log.report(0x10000, 8 * PAGE)).pages()) == [0x10000, 0x12000, 0x13000]
        assert list((await log.report(0x10000, 16 * PAGE)).pages()) == [0x10000, 0x1A000]
        session.windows.write(0x1B800, b"d")
        assert list((await log.report(0x1A000, 2 * PAGE, 1024)).pages()) == [
            0x1A000,
            *range(0x1B000, 0x1C000, 1024),
        ]
        session.windows.write(0x1C000, b"e")
        await log.stop()
        assert list((await log.report(0x1C000, PAGE)).pages()) == [0x1C000], "the device's own word"


async def test_a_log_that_is_refused_logs_nothing_here() -> None:
    async with session_with() as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            peer.refuse(await peer.expect(FEATURE), EINVAL)

        nursery.start_soon(serve)
        with pytest.raises(client.ServerError):
            await DirtyLog(session).start()
        session.windows.add(Window(0, PAGE, DmaMapFlags.WRITE, memoryview(bytearray(PAGE))))
        session.windows.write(0, b"x")
        assert list(session.windows.take_written(0, PAGE)) == []


async def test_a_log_that_is_kept_already_loses_nothing_by_another_start() -> None:
    device = FakeLog(lambda iova, length, page_size: bits(count=length // page_size))
    async with session_with(capabilities=LARGE) as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            device.answer(peer, await peer.expect(FEATURE))
            peer.refuse(await peer.expect(FEATURE), EINVAL)
            device.answer(peer, await peer.expect(FEATURE))

        nursery.start_soon(serve)
        session.windows.add(Window(0, PAGE, DmaMapFlags.WRITE, memoryview(bytearray(PAGE))))
        log = DirtyLog(session)
        await log.start()
        session.windows.write(0, b"x")
        with pytest.raises(client.ServerError):
            await DirtyLog(session).start()
        assert list((await log.report(0, PAGE)).pages()) == [0]


@pytest.mark.parametrize("page_size", [0, -1, 48])
async def test_no_log_is_kept_of_pages_that_cannot_be(page_size: int) -> None:
    async with session_with() as (session, _):
        with pytest.raises(client.ClientError, match="pages"):
            await DirtyLog(session).start(page_size)
        assert not session.windows.logging


async def test_small_pages_do_not_let_a_server_cost_more_than_its_windows() -> None:
    async with logging(FakeLog(lambda iova, length, page_size: bits(count=length // page_size))) as session:
        session.windows.add(Window(0, 2 * PAGE, DmaMapFlags.WRITE, memoryview(bytearray(2 * PAGE))))
        log = DirtyLog(session)
        await log.start(1)
        session.windows.write(0, bytes(PAGE))
        assert session.windows.log_page_size == PAGE
        assert (await log.report(0, 2 * PAGE, 1)).count() == PAGE


async def test_a_server_that_sends_next_to_nothing_is_refused_not_asked() -> None:
    tiny = b'{"capabilities":{"max_data_xfer_size":7}}\0'
    async with session_with(capabilities=tiny) as (session, _):
        with pytest.raises(LocalProtocolError, match="bitmap"):
            await DirtyLog(session).report(0, PAGE)


async def unmapping(answer: Callable[[Peer, Message], None]) -> tuple[DirtyBitmap, bool]:
    """Map and unmap a window of 10 pages; the bitmap, and whether the window is still there."""
    async with session_with(capabilities=LARGE) as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            peer.reply(await peer.expect(DMA_MAP))
            message = await peer.expect(DMA_UNMAP)
            assert message.payload == struct.pack("=IIQQQQ", 48, 1, 0x10000, 10 * PAGE, PAGE, 8)
            answer(peer, message)

        nursery.start_soon(serve)
        await session.dma_map(0x10000, 10 * PAGE)
        bitmap = await DirtyLog(session).unmap(0x10000, 10 * PAGE)
        return bitmap, (0x10000, 10 * PAGE) in session.windows


async def test_a_window_tells_its_dirty_pages_when_it_goes() -> None:
    bitmap, there = await unmapping(lambda peer, to: peer.reply(to, to.payload + bits(1, 9, count=10)))
    assert list(bitmap.pages()) == [0x11000, 0x19000]
    assert not there


@pytest.mark.parametrize(
    "tail",
    [b"", bits(count=10), bytes(16) + bits(count=10), struct.pack("=QQ", PAGE, 8) + bits(11, count=64)],
)
async def test_a_window_that_goes_with_nonsense_is_an_error(tail: bytes) -> None:
    with pytest.raises(BaseExceptionGroup) as failure:
        await unmapping(lambda peer, to: peer.reply(to, to.payload[:24] + tail))
    assert failure.group_contains(client.BadReplyError)


async def test_a_bitmap_larger_than_a_message_is_not_asked_for() -> None:
    async with session_with() as (session, _):
        with pytest.raises(client.ClientError, match="does not fit"):
            await DirtyLog(session).unmap(0, 4097 * 8 * PAGE)


async def test_what_was_written_by_message_is_told_when_the_window_goes() -> None:
    async with session_with(capabilities=LARGE) as (session, peer), trio.open_nursery() as nursery:

        async def serve() -> None:
            FakeLog(lambda *_: b"").answer(peer, await peer.expect(FEATURE))
            message = await peer.expect(DMA_UNMAP)
            peer.reply(message, message.payload + bits(1, count=10))

        nursery.start_soon(serve)
        memory = memoryview(bytearray(10 * PAGE))
        session.windows.add(Window(0x10000, len(memory), DmaMapFlags.WRITE, memory))
        log = DirtyLog(session)
        await log.start()
        session.windows.write(0x13000, b"x")
        assert list((await log.unmap(0x10000, 10 * PAGE)).pages()) == [0x11000, 0x13000]


@given(st.sets(st.integers(0, 299)))
def test_pages_are_the_bits_that_are_set(pages: set[int]) -> None:
    words = struct.unpack("=5Q", bits(*pages, count=300))
    bitmap = DirtyBitmap(0x5000, 300 * PAGE, PAGE, words)
    assert [(page - 0x5000) // PAGE for page in bitmap.pages()] == sorted(pages)
    assert bitmap.count() == len(pages)
