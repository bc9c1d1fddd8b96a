import errno
import os
import struct
from collections.abc import Iterator

import pytest

from device.function import IoEventFdArea
from tests.server.raw import GET_IO_FDS, RawClient
from tests.server.world import World


def io_fds(region: int, *, argsz: int = 4096, flags: int = 0, count: int = 0) -> bytes:
    return struct.pack("=IIII", argsz, flags, region, count)


@pytest.fixture
def doorbells(served: World) -> Iterator[list[int]]:
    """Three eventfds, for four parts of region 0."""
    fds = [os.eventfd(0) for _ in range(3)]
    served.function.doorbells = {
        0: [
            IoEventFdArea(0x10, 2, fds[0]),
            IoEventFdArea(0x14, 2, fds[1]),
            IoEventFdArea(0x18, 4, fds[0], datamatch=7),
            IoEventFdArea(0x20, 0, fds[2]),
        ]
    }
    yield fds
    for fd in fds:
        os.close(fd)


async def test_doorbells_are_given_away_as_eventfds(client: RawClient, doorbells: list[int]) -> None:
    reply = await client.do(GET_IO_FDS, io_fds(0))
    assert reply.unpack("IIII") == (16 + 4 * 40, 0, 0, 4)
    entries = [struct.unpack_from("=QQIIIIQ", reply.payload, 16 + 40 * n) for n in range(4)]
    assert entries == [
        (0x10, 2, 0, 0, 0, 0, 0),
        (0x14, 2, 1, 0, 0, 0, 0),
        (0x18, 4, 0, 0, 1, 0, 7),
        (0x20, 0, 2, 0, 0, 0, 0),
    ]
    assert len(reply.fds) == 3
    os.eventfd_write(reply.fds[1], 5)
    assert os.eventfd_read(doorbells[1]) == 5
    reply.close()


async def test_a_client_with_little_room_is_told_how_much_doorbells_take(
    client: RawClient, doorbells: list[int]
) -> None:
    reply = await client.do(GET_IO_FDS, io_fds(0, argsz=16 + 4 * 40 - 1))
    assert reply.unpack("IIII") == (16 + 4 * 40, 0, 0, 4)
    assert len(reply.payload) == 16
    assert not reply.fds


@pytest.mark.parametrize("most", [0, 1, 2])
async def test_a_client_gets_as_many_doorbells_as_it_takes_descriptors(
    served: World, doorbells: list[int], most: int
) -> None:
    client = await served.connect()
    await client.negotiate({"max_msg_fds": most})
    reply = await client.do(GET_IO_FDS, io_fds(0))
    assert len(reply.fds) == most
    assert reply.unpack("IIII")[3] == [0, 2, 3][most]
    reply.close()


async def test_a_region_without_doorbells_has_none(client: RawClient, doorbells: list[int]) -> None:
    reply = await client.do(GET_IO_FDS, io_fds(2))
    assert reply.payload == struct.pack("=IIII", 16, 0, 2, 0)
    assert not reply.fds


@pytest.mark.parametrize(
    "question", [io_fds(9), io_fds(0, argsz=15), io_fds(0, flags=1), io_fds(0, count=1), io_fds(0)[:-1]]
)
async def test_doorbells_that_make_no_sense_are_refused(client: RawClient, question: bytes) -> None:
    assert await client.refused(GET_IO_FDS, question) == errno.EINVAL
