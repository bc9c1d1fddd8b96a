import errno
import struct

import pytest

from tests.server.raw import NO_REPLY, WRITE_MULTI, RawClient, message
from tests.server.world import BAR2_SIZE, World


def writes(*entries: tuple[int, int, bytes]) -> bytes:
    """The payload of a REGION_WRITE_MULTI of (region, offset, data)."""
    return struct.pack("=Q", len(entries)) + b"".join(
        struct.pack("=QII8s", offset, region, len(data), data) for region, offset, data in entries
    )


@pytest.fixture
async def bundling(served: World) -> RawClient:
    """A client that writes in bundles."""
    client = await served.connect()
    reply = await client.negotiate({"max_msg_fds": 8, "write_multiple": True})
    assert b'"write_multiple":true' in reply.payload
    return client


async def test_writes_of_a_bundle_are_done_in_order(served: World, bundling: RawClient) -> None:
    entries = [(0, 4 * n % 256, struct.pack("=I", n)) for n in range(200)]
    assert (await bundling.do(WRITE_MULTI, writes(*entries))).unpack("Q") == (200,)
    assert served.card.registers.written == [(4 * n % 256, 4, n) for n in range(200)]


async def test_a_bundle_ends_with_the_first_write_that_fails(served: World, bundling: RawClient) -> None:
    bundle = writes((2, 0, b"ab"), (2, 2, b"c"), (2, BAR2_SIZE, b"x"), (2, 0, b"no"))
    assert (await bundling.do(WRITE_MULTI, bundle)).unpack("Q") == (2,)
    assert await bundling.read(2, 0, 4) == b"abc\0"


async def test_a_bundle_that_fails_at_once_is_refused(bundling: RawClient) -> None:
    bundle = writes((9, 0, b"x"), (2, 0, b"no"))
    assert await bundling.refused(WRITE_MULTI, bundle) == errno.EINVAL
    assert await bundling.read(2, 0, 2) == bytes(2)


async def test_an_empty_bundle_is_done(bundling: RawClient) -> None:
    assert (await bundling.do(WRITE_MULTI, writes())).unpack("Q") == (0,)


async def test_a_posted_bundle_is_done_before_what_follows(bundling: RawClient) -> None:
    await bundling.send(message(WRITE_MULTI, writes((2, 0, b"abcd")), flags=NO_REPLY))
    assert await bundling.read(2, 0, 4) == b"abcd"


@pytest.mark.parametrize(
    "bundle",
    [
        writes((2, 0, b"")),
        writes((2, 0, b"x"))[:-1],
        writes((2, 0, b"x")) + b"x",
        struct.pack("=Q", 1 << 60),
        struct.pack("=QQII8s", 1, 0, 2, 9, b""),
        writes(*[(2, 0, b"x")] * 201),
    ],
)
async def test_a_bundle_that_makes_no_sense_is_refused(bundling: RawClient, bundle: bytes) -> None:
    assert await bundling.refused(WRITE_MULTI, bundle) == errno.EINVAL


async def test_bundles_are_refused_unless_they_were_agreed_on(client: RawClient) -> None:
    assert await client.refused(WRITE_MULTI, writes()) in (errno.EINVAL, errno.EOPNOTSUPP)
