import errno
import mmap
import os
import struct
from pathlib import Path

import pytest

from device.function import BarKind, Identity, MemoryBar, PciFunction
from device.revocation import Revocation
from protocol.limits import MAX_DMA_BUF_RANGES
from tests.server.raw import CONFIG, FEATURE, GET_REGION_INFO, Message, RawClient
from tests.server.world import BAR2_SIZE, PAGE, Card, World, world

GET, SET, PROBE = (1 << bit for bit in (16, 17, 18))
DMA_BUF = 11
COMMAND, MEMORY = 0x04, 0x2
HUGE = 1 << 63


def question(
    *ranges: tuple[int, int],
    bar: int = 2,
    flags: int = 0,
    count: int | None = None,
    method: int = GET,
    argsz: int = 1 << 16,
) -> bytes:
    """The payload that asks for an export."""
    head = struct.pack(
        "=IIIIII", argsz, method | DMA_BUF, bar, 0, flags, len(ranges) if count is None else count
    )
    return head + b"".join(struct.pack("=QQ", *one) for one in ranges)


async def exported(client: RawClient, *ranges: tuple[int, int], bar: int = 2) -> tuple[Message, int]:
    """The answer and its one descriptor, the caller's."""
    reply = await client.do(FEATURE, question(*ranges, bar=bar))
    (fd,) = reply.fds
    return reply, fd


ONE = (0, PAGE)

# What is wrong, and what the kernel calls it. Many are wrong in two ways: the order of the checks is seen.
REFUSALS: list[tuple[str, bytes, int]] = [
    ("no ranges", question(), errno.EINVAL),
    ("SET", question(ONE, method=SET), errno.EINVAL),
    ("flags, of no BAR", question(ONE, bar=6, flags=1), errno.EINVAL),
    ("no ranges, of no BAR", question(bar=6), errno.EINVAL),
    ("the ROM, empty", question((0, 0), bar=6), errno.ENODEV),
    ("configuration space, unaligned", question((1, PAGE), bar=CONFIG), errno.ENODEV),
    ("VGA, which wraps", question((HUGE, HUGE), bar=8), errno.ENODEV),
    ("a region that nobody has", question(ONE, bar=2**32 - 1), errno.ENODEV),
    ("an absent BAR, empty", question((0, 0), bar=1), errno.ENODEV),
    ("registers, empty", question((0, 0), bar=0), errno.EINVAL),
    ("registers", question(ONE, bar=0), errno.EINVAL),
    ("empty", question((0, 0)), errno.EINVAL),
    ("an empty one behind a good one", question(ONE, (PAGE, 0)), errno.EINVAL),
    ("offset not of pages, which wraps", question((2**64 - 1, PAGE)), errno.EINVAL),
    ("length not of pages", question((0, PAGE + 1)), errno.EINVAL),
    ("all together wrap", question((0, HUGE), (0, HUGE)), errno.EINVAL),
    ("all together have the bit of bounce buffers, and wrap", question((HUGE, HUGE)), errno.EINVAL),
    ("one that wraps", question((2**64 - PAGE, 2 * PAGE)), errno.EOVERFLOW),
    ("one that ends where addresses end", question((2**64 - PAGE, PAGE)), errno.EOVERFLOW),
    ("one that wraps before one outside", question((2**64 - PAGE, PAGE), (BAR2_SIZE, PAGE)), errno.EOVERFLOW),
    ("one outside before one that wraps", question((BAR2_SIZE, PAGE), (2**64 - PAGE, PAGE)), errno.EINVAL),
    ("a page too long", question((PAGE, BAR2_SIZE)), errno.EINVAL),
    ("behind the end", question((BAR2_SIZE, PAGE)), errno.EINVAL),
]


@pytest.mark.parametrize(
    ("payload", "number"), [row[1:] for row in REFUSALS], ids=[row[0] for row in REFUSALS]
)
async def test_the_validation_matrix_is_the_kernels(client: RawClient, payload: bytes, number: int) -> None:
    assert await client.refused(FEATURE, payload) == number


@pytest.mark.parametrize(
    "payload",
    [
        question(count=1),
        question(ONE, count=2),
        question(ONE, count=2**32 - 1),
        question(ONE, ONE, count=1),
        question(ONE)[:-1],
        question(ONE)[:23],
        question(ONE, argsz=39),
        question(*[ONE] * (MAX_DMA_BUF_RANGES + 1)),
    ],
)
async def test_a_malformed_export_is_refused(client: RawClient, payload: bytes) -> None:
    assert await client.refused(FEATURE, payload) == errno.EINVAL
    _, fd = await exported(client, ONE)
    os.close(fd)


async def test_an_export_is_answered_with_the_bars_own_file(client: RawClient) -> None:
    await client.write(2, PAGE, b"of the card")
    reply, fd = await exported(client, (PAGE, PAGE))
    assert reply.payload == question((PAGE, PAGE), argsz=8 + 16 + 16)
    with mmap.mmap(fd, BAR2_SIZE) as memory:
        assert memory[PAGE : PAGE + 11] == b"of the card"
        memory[PAGE : PAGE + 11] = b"of the host"
    os.close(fd)
    assert await client.read(2, PAGE, 11) == b"of the host"
    described = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", 32, 0, 2, 0, 0, 0))
    assert described.unpack("IIIIQQ")[5] == 0  # ranges begin where mmap would
    described.close()


@pytest.mark.parametrize(
    "ranges",
    [((0, BAR2_SIZE),), ((PAGE, PAGE), ONE), ((0, BAR2_SIZE), ONE, ONE), (ONE,) * MAX_DMA_BUF_RANGES],
    ids=["whole", "in another order", "overlapping", "as many as there may be"],
)
async def test_ranges_are_granted_as_they_were_asked_for(
    client: RawClient, ranges: tuple[tuple[int, int], ...]
) -> None:
    reply, fd = await exported(client, *ranges)
    os.close(fd)
    assert reply.payload[8:] == question(*ranges)[8:]


async def test_open_flags_do_not_matter(client: RawClient) -> None:
    asked = struct.pack("=IIIIIIQQ", 64, GET | DMA_BUF, 2, os.O_CLOEXEC | os.O_RDWR, 0, 1, 0, PAGE)
    reply = await client.do(FEATURE, asked)
    reply.close()
    assert reply.payload[8:] == asked[8:]


async def test_a_bar_is_exported_while_memory_decoding_is_off(served: World, client: RawClient) -> None:
    await client.write(CONFIG, COMMAND, b"\0\0")
    assert not served.function.memory_enabled
    _, fd = await exported(client, ONE)
    os.close(fd)


@pytest.mark.parametrize("methods", [0, GET, SET, GET | SET])
async def test_a_probe_says_that_an_export_can_be_got(client: RawClient, methods: int) -> None:
    probe = struct.pack("=II", 8, PROBE | methods | DMA_BUF)
    if methods & SET:
        assert await client.refused(FEATURE, probe) == errno.EINVAL
    else:
        reply = await client.do(FEATURE, probe)
        assert (reply.payload, reply.fds) == (probe, [])


async def test_a_client_that_takes_no_descriptors_is_offered_no_export(served: World) -> None:
    client = await served.connect()
    await client.negotiate({"max_msg_fds": 0})
    for payload in (question(ONE), question(ONE, bar=6), struct.pack("=II", 8, PROBE | GET | DMA_BUF)):
        assert await client.refused(FEATURE, payload) == errno.EOPNOTSUPP


async def test_an_export_outlives_its_client_and_shows_the_next_one_nothing(served: World) -> None:
    first = await served.client()
    _, fd = await exported(first, ONE)
    first.close()
    second = await served.client()
    await second.write(2, 0, b"secret")
    with mmap.mmap(fd, PAGE) as memory:
        assert memory[:6] == bytes(6)
    os.close(fd)


@pytest.mark.parametrize("start", [0, 8 << 30, (16 << 30) - PAGE])
async def test_ranges_of_more_than_8_gib_are_counted_in_64_bits(tmp_path: Path, start: int) -> None:
    card = Card()
    large = MemoryBar(4, 16 << 30, kind=BarKind.MEM64)
    card.function = PciFunction("large", Identity(0x1AF4, 0x1041, 0x8086, 0x001A), bars=[large])
    async with world(tmp_path, card=card) as served:
        client = await served.client()
        length = (16 << 30) - start
        reply, fd = await exported(client, (start, length), bar=4)
        assert reply.unpack("IIIIIIQQ")[6:] == (start, length)
        os.pwrite(fd, b"the end", start + length - 7)
        os.close(fd)
        assert large.read((16 << 30) - 7, 7) == b"the end"
        assert await client.refused(FEATURE, question((start + PAGE, length), bar=4)) == errno.EINVAL


async def test_what_a_bar_has_no_memory_for_is_not_exported(tmp_path: Path) -> None:
    card = Card()
    part = MemoryBar(4, 4 * PAGE, backing=3 * PAGE)
    small = MemoryBar(2, 0x100)
    card.function = PciFunction("part", Identity(0x1AF4, 0x1041, 0x8086, 0x001A), bars=[part, small])
    async with world(tmp_path, card=card) as served:
        client = await served.client()
        _, fd = await exported(client, (0, 3 * PAGE), bar=4)
        os.close(fd)
        for outside in ((0, 4 * PAGE), (3 * PAGE, PAGE)):
            assert await client.refused(FEATURE, question(outside, bar=4)) == errno.EINVAL
        assert await client.refused(FEATURE, question((0, PAGE), bar=2)) == errno.EINVAL


async def test_lost_memory_is_not_exported_until_it_is_repaired(tmp_path: Path) -> None:
    card = Card()
    bar = MemoryBar(4, 4 * PAGE, revocation=Revocation.ENFORCED)
    card.function = PciFunction("lost", Identity(0x1AF4, 0x1041, 0x8086, 0x001A), bars=[bar])
    async with world(tmp_path, card=card) as served:
        client = await served.client()
        await client.write(CONFIG, COMMAND, b"\2\0")
        served.function.poison(4, 2 * PAGE)
        _, fd = await exported(client, (0, 2 * PAGE), bar=4)
        os.close(fd)
        assert await client.refused(FEATURE, question((PAGE, 2 * PAGE), bar=4)) == errno.EIO
        bar.repair()
        _, fd = await exported(client, (PAGE, 2 * PAGE), bar=4)
        assert os.fstat(fd).st_size == 4 * PAGE
        os.close(fd)
        await client.write(CONFIG, COMMAND, b"\0\0")
        _, fd = await exported(client, (PAGE, 2 * PAGE), bar=4)
        assert os.fstat(fd).st_size == 0
        os.close(fd)
