import errno
import os
import struct
from functools import partial
from pathlib import Path

import pytest

from device.dma import MAX_REPORT
from device.function import ResetKind
from protocol.limits import Limits
from server import serve
from server.session import Session
from tests.server.raw import DMA_MAP, DMA_UNMAP, FEATURE, RawClient, dma
from tests.server.test_features import GET, REPORT, SET, START, STOP_LOG, feature
from tests.server.world import PAGE, World, world

SIZE = 256 * PAGE
IOVA = 0x10_0000


@pytest.fixture
async def client(served: World) -> RawClient:
    """A client with a window of 256 pages."""
    client = await served.client()
    fd = os.memfd_create("guest")
    os.truncate(fd, SIZE)
    await client.do(DMA_MAP, dma(IOVA, SIZE), [fd])
    os.close(fd)
    return client


def start(
    page_size: int = PAGE, *ranges: tuple[int, int], count: int | None = None, argsz: int = 4096
) -> bytes:
    """The payload of a DMA_LOGGING_START."""
    data = struct.pack("=QII", page_size, len(ranges) if count is None else count, 0)
    data += b"".join(struct.pack("=QQ", *one) for one in ranges)
    return feature(SET | START, data, argsz=argsz)


def report(iova: int = IOVA, length: int = SIZE, page_size: int = PAGE, *, argsz: int = 1 << 20) -> bytes:
    """The payload of a DMA_LOGGING_REPORT."""
    return feature(GET | REPORT, struct.pack("=QQQ", iova, length, page_size), argsz=argsz)


async def dirty(client: RawClient, iova: int = IOVA, length: int = SIZE, page_size: int = PAGE) -> set[int]:
    """The numbers of the pages that were written to."""
    reply = await client.do(FEATURE, report(iova, length, page_size))
    argsz, flags, *span = reply.unpack("IIQQQ")
    bits = reply.payload[32:]
    assert (argsz, flags, span) == (len(reply.payload), GET | REPORT, [iova, length, page_size])
    assert len(bits) % 8 == 0
    assert len(bits) == -(-length // page_size // 64) * 8
    number = int.from_bytes(bits, "little")
    return {at for at in range(8 * len(bits)) if number >> at & 1}


async def test_what_the_card_writes_is_logged_until_it_is_reported(served: World, client: RawClient) -> None:
    reply = await client.do(FEATURE, start())
    assert reply.payload == start()
    assert await dirty(client) == set()
    served.function.dma.write(IOVA + 3 * PAGE - 1, b"ab")
    served.function.dma.write(IOVA + 255 * PAGE, b"c")
    served.function.dma.read(IOVA + 9 * PAGE, 4)
    assert await dirty(client) == {2, 3, 255}
    assert await dirty(client) == set()


async def test_a_part_is_reported_and_the_rest_kept(served: World, client: RawClient) -> None:
    await client.do(FEATURE, start(PAGE, (IOVA, SIZE)))
    for page in (0, 63, 64, 200):
        served.function.dma.write(IOVA + page * PAGE, b"x")
    assert await dirty(client, IOVA + 64 * PAGE, 64 * PAGE) == {0}
    assert await dirty(client) == {0, 63, 200}


async def test_pages_are_reported_in_the_size_that_is_asked_for(served: World, client: RawClient) -> None:
    await client.do(FEATURE, start())
    served.function.dma.write(IOVA + 17 * PAGE, b"x")
    assert await dirty(client, page_size=16 * PAGE) == {1}


async def test_a_page_size_that_is_too_small_is_made_larger(client: RawClient) -> None:
    reply = await client.do(FEATURE, start(512, (IOVA, SIZE)))
    assert reply.payload == start(PAGE, (IOVA, SIZE))


async def test_logging_stops(served: World, client: RawClient) -> None:
    await client.do(FEATURE, start())
    stop = feature(SET | STOP_LOG, argsz=8)
    assert (await client.do(FEATURE, stop)).payload == stop
    assert not served.function.dma.logging
    assert await client.refused(FEATURE, report()) == errno.EINVAL
    await client.do(FEATURE, stop)
    await client.do(FEATURE, start())


async def test_logging_does_not_start_twice(client: RawClient) -> None:
    await client.do(FEATURE, start())
    assert await client.refused(FEATURE, start()) == errno.EINVAL


async def test_logging_ends_with_the_client(served: World, client: RawClient) -> None:
    await client.do(FEATURE, start())
    client.close()
    another = await served.client()
    assert served.card.resets == [ResetKind.LOST_CLIENT]
    assert not served.function.dma.logging
    await another.do(FEATURE, start())


@pytest.mark.parametrize(
    "request_",
    [
        start(0),
        start(3 * PAGE),
        start(PAGE, (1, PAGE)),
        start(PAGE, (0, PAGE - 1)),
        start(PAGE, (0, 0)),
        start(PAGE, ((1 << 64) - PAGE, 2 * PAGE)),
        start(PAGE, (0, 2 * PAGE), (PAGE, PAGE)),
        start(PAGE, (PAGE, PAGE), (0, 2 * PAGE)),
        start(PAGE, count=1),
        start(PAGE, *[(n * PAGE, PAGE) for n in range(257)]),
    ],
)
async def test_ranges_that_make_no_sense_are_refused(
    served: World, client: RawClient, request_: bytes
) -> None:
    assert await client.refused(FEATURE, request_) == errno.EINVAL
    assert not served.function.dma.logging


async def test_as_many_ranges_are_taken_as_the_kernel_takes(client: RawClient) -> None:
    await client.do(FEATURE, start(PAGE, *[(n * PAGE, PAGE) for n in range(256)], argsz=8 + 16 + 256 * 16))


@pytest.mark.parametrize(
    "question",
    [
        report(page_size=0),
        report(page_size=2048),
        report(page_size=3 * PAGE),
        report(length=0),
        report(iova=(1 << 64) - PAGE, length=2 * PAGE),
        report(length=1 << 63),
        report(argsz=8 + 24 + 31),
        report(iova=IOVA + 1),
        report(length=SIZE - 1),
    ],
)
async def test_a_report_that_makes_no_sense_is_refused_and_forgets_nothing(
    served: World, client: RawClient, question: bytes
) -> None:
    await client.do(FEATURE, start())
    served.function.dma.write(IOVA, b"x")
    assert await client.refused(FEATURE, question) == errno.EINVAL
    assert await dirty(client) == {0}


# --- a window goes, and its dirty pages are told


def unmap(
    iova: int = IOVA, size: int = SIZE, page_size: int = PAGE, bitmap: int = 32, *, argsz: int = 4096
) -> bytes:
    """The payload of a DMA_UNMAP with a dirty bitmap."""
    return struct.pack("=IIQQQQ", argsz, 1, iova, size, page_size, bitmap)


async def test_a_window_is_taken_away_with_its_dirty_pages(served: World, client: RawClient) -> None:
    await client.do(FEATURE, start())
    served.function.dma.write(IOVA + 65 * PAGE, b"x")
    reply = await client.do(DMA_UNMAP, unmap(argsz=24 + 16 + 32))
    assert reply.payload[:40] == unmap(argsz=24 + 16 + 32)
    assert int.from_bytes(reply.payload[40:], "little") == 1 << 65
    assert len(reply.payload) == 24 + 16 + 32
    assert len(served.function.dma) == 0


async def test_more_room_than_the_bits_need_is_filled_up(served: World, client: RawClient) -> None:
    await client.do(FEATURE, start())
    reply = await client.do(DMA_UNMAP, unmap(bitmap=40))
    assert reply.payload == unmap(bitmap=40, argsz=24 + 16 + 40) + bytes(40)


@pytest.mark.parametrize(
    "request_",
    [
        unmap(bitmap=31),
        unmap(bitmap=24),
        unmap(page_size=0),
        unmap(page_size=2048),
        unmap(page_size=3 * PAGE),
        unmap(argsz=24 + 16 + 31),
        unmap(bitmap=(1 << 20) + 8, argsz=1 << 30),
        unmap(size=SIZE - PAGE),
        unmap(size=SIZE + PAGE, page_size=2 * PAGE, bitmap=40),
        unmap()[:-1],
        struct.pack("=IIQQQQ", 4096, 3, 0, 0, PAGE, 32),
    ],
)
async def test_an_unmap_with_a_bitmap_that_makes_no_sense_does_nothing(
    served: World, client: RawClient, request_: bytes
) -> None:
    await client.do(FEATURE, start())
    served.function.dma.write(IOVA, b"x")
    assert await client.refused(DMA_UNMAP, request_) == errno.EINVAL
    assert len(served.function.dma) == 1
    assert await dirty(client) == {0}


async def test_a_window_with_more_pages_than_are_reported_at_once_stays(tmp_path: Path) -> None:
    by = partial(serve, session=partial(Session, offer=Limits(max_data_xfer_size=2 * MAX_REPORT)))
    async with world(tmp_path, by=by) as served:
        client = await served.connect()
        await client.negotiate({"max_msg_fds": 8, "max_data_xfer_size": 2 * MAX_REPORT})
        size = (8 * MAX_REPORT + 1) * PAGE
        await client.do(DMA_MAP, dma(0, size))
        await client.do(FEATURE, start())
        question = unmap(0, size, bitmap=MAX_REPORT + 8, argsz=2 * MAX_REPORT)
        assert await client.refused(DMA_UNMAP, question) == errno.EINVAL
        assert len(served.function.dma) == 1


async def test_there_is_no_bitmap_unless_writes_are_logged(served: World, client: RawClient) -> None:
    assert await client.refused(DMA_UNMAP, unmap()) == errno.EINVAL
    assert len(served.function.dma) == 1
