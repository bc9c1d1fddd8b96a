import errno
import struct

import pytest

from device.migration.migration import Migration
from tests.server.raw import (
    FEATURE,
    MIG_READ,
    MIG_WRITE,
    RESET,
    RawClient,
)
from tests.server.world import BAR2_SIZE, World

GET, SET, PROBE = (1 << bit for bit in (16, 17, 18))
MIGRATION, STATE, START, STOP_LOG, REPORT = 1, 2, 6, 7, 8
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY = range(7)


def feature(flags: int, data: bytes = b"", *, argsz: int = 4096) -> bytes:
    """The payload of a DEVICE_FEATURE."""
    return struct.pack("=II", argsz, flags) + data


def state(number: int) -> bytes:
    """The payload that asks for a migration state."""
    return feature(SET | STATE, struct.pack("=II", number, 0))


async def current(client: RawClient) -> int:
    """The migration state."""
    reply = await client.do(FEATURE, feature(GET | STATE))
    argsz, flags, number, fd = reply.unpack("IIII")
    assert (argsz, flags, fd, len(reply.payload)) == (16, GET | STATE, 0, 16)
    return int(number)


@pytest.fixture
async def moving(served: World) -> RawClient:
    """A client of a card that can be migrated."""
    served.function.migration = Migration(served.function)
    return await served.client()


# --- which features there are


@pytest.mark.parametrize("number", [0, 3, 4, 5, 9, 10, 0xFFFF])
@pytest.mark.parametrize("method", [GET, SET, PROBE])
async def test_a_feature_that_is_none_is_refused(moving: RawClient, number: int, method: int) -> None:
    assert await moving.refused(FEATURE, feature(method | number, bytes(8))) == errno.ENOTTY


@pytest.mark.parametrize("flags", [GET | MIGRATION, PROBE | MIGRATION, GET | STATE, SET | STATE])
async def test_a_card_that_cannot_be_moved_says_so(client: RawClient, flags: int) -> None:
    assert await client.refused(FEATURE, feature(flags, bytes(8))) == errno.ENOTTY
    assert await client.refused(MIG_READ, struct.pack("=II", 108, 100)) == errno.ENOTTY
    assert await client.refused(MIG_WRITE, struct.pack("=II", 9, 1) + b"x") == errno.ENOTTY


@pytest.mark.parametrize(
    ("number", "methods"),
    [(MIGRATION, GET), (STATE, GET | SET), (START, SET), (STOP_LOG, SET), (REPORT, GET)],
)
async def test_a_probe_tells_which_methods_a_feature_has(
    moving: RawClient, number: int, methods: int
) -> None:
    for asked in (0, GET, SET, GET | SET):
        probe = feature(PROBE | asked | number, b"as it came")
        if asked & ~methods:
            assert await moving.refused(FEATURE, probe) == errno.EINVAL
        else:
            assert (await moving.do(FEATURE, probe)).payload == probe
    for method in (GET, SET):
        if not method & methods:
            assert await moving.refused(FEATURE, feature(method | number, bytes(40))) == errno.EINVAL


@pytest.mark.parametrize(
    "question",
    [
        feature(MIGRATION),
        feature(GET | SET | STATE, bytes(8)),
        feature(GET | MIGRATION | 1 << 19),
        feature(GET | MIGRATION | 1 << 31),
        feature(GET | MIGRATION, argsz=15),
        feature(GET | STATE, argsz=8),
        feature(SET | STATE, bytes(7)),
        feature(SET | STATE, bytes(8), argsz=15),
        feature(PROBE | STATE, argsz=7),
        feature(SET | START, bytes(15)),
        feature(GET | REPORT, bytes(23)),
        feature(GET | MIGRATION)[:7],
    ],
)
async def test_a_feature_used_wrongly_is_refused(moving: RawClient, question: bytes) -> None:
    assert await moving.refused(FEATURE, question) == errno.EINVAL
    assert await current(moving) == RUNNING


# --- migration


async def test_a_card_tells_how_it_can_be_moved(moving: RawClient) -> None:
    reply = await moving.do(FEATURE, feature(GET | MIGRATION, argsz=16))
    assert reply.payload == struct.pack("=IIQ", 16, GET | MIGRATION, 0b101)


async def test_a_card_stops_and_runs_again(served: World, moving: RawClient) -> None:
    assert await current(moving) == RUNNING
    assert (await moving.do(FEATURE, state(STOP))).payload == state(STOP)
    assert await current(moving) == STOP
    assert not served.function.running
    await moving.do(FEATURE, state(RUNNING))
    assert served.function.running


@pytest.mark.parametrize("number", [ERROR, RUNNING_P2P, 7, 8, 0xFFFFFFFF])
async def test_a_state_that_leads_nowhere_is_refused(moving: RawClient, number: int) -> None:
    assert await moving.refused(FEATURE, state(number)) == errno.EINVAL
    assert await current(moving) == RUNNING


async def read_all(client: RawClient, size: int) -> bytes:
    """The card's state, in pieces of ``size`` bytes at most; the last one is shorter."""
    stream = b""
    while True:
        reply = await client.do(MIG_READ, struct.pack("=II", 8 + size, size))
        argsz, length = reply.unpack("II")
        assert argsz == 8 + length == len(reply.payload)
        assert length <= size
        stream += reply.payload[8:]
        if length < size:
            return stream


async def write_all(client: RawClient, stream: bytes, size: int) -> None:
    """Another card's state, in pieces of ``size`` bytes."""
    for at in range(0, len(stream), size):
        piece = stream[at : at + size]
        reply = await client.do(MIG_WRITE, struct.pack("=II", 8 + len(piece), len(piece)) + piece)
        assert reply.payload == b""


@pytest.mark.parametrize("size", [100, 1 << 20])
async def test_what_one_card_was_another_becomes(moving: RawClient, size: int) -> None:
    content = bytes(range(256)) * (BAR2_SIZE // 256)
    await moving.write(2, 0, content)
    await moving.write(7, 0x3C, b"\x0b")
    await moving.do(FEATURE, state(PRE_COPY))
    stream = await read_all(moving, size)
    await moving.write(2, 7, b"changed")
    await moving.do(FEATURE, state(STOP_COPY))
    stream += await read_all(moving, size)
    await moving.do(RESET)
    assert await current(moving) == RUNNING
    assert await moving.read(2, 0, 16) == bytes(16)
    await moving.do(FEATURE, state(RESUMING))
    await write_all(moving, stream, size)
    await moving.do(FEATURE, state(RUNNING))
    assert await moving.read(2, 0, BAR2_SIZE) == content[:7] + b"changed" + content[14:]
    assert await moving.read(7, 0x3C, 1) == b"\x0b"


async def test_half_a_state_is_refused_and_a_reset_mends_it(moving: RawClient) -> None:
    await moving.do(FEATURE, state(STOP_COPY))
    stream = await read_all(moving, 4096)
    await moving.do(FEATURE, state(RESUMING))
    await write_all(moving, stream[: len(stream) // 2], 4096)
    assert await moving.refused(FEATURE, state(STOP)) == errno.EINVAL
    assert await current(moving) == ERROR
    await moving.do(RESET)
    assert await current(moving) == RUNNING


async def test_migration_data_out_of_turn_are_refused(moving: RawClient) -> None:
    assert await moving.refused(MIG_READ, struct.pack("=II", 108, 100)) == errno.EINVAL
    assert await moving.refused(MIG_WRITE, struct.pack("=II", 9, 1) + b"x") == errno.EINVAL


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (MIG_READ, struct.pack("=II", 107, 100)),
        (MIG_READ, struct.pack("=II", (1 << 20) + 9, (1 << 20) + 1)),
        (MIG_WRITE, struct.pack("=II", 10, 2) + b"x"),
        (MIG_WRITE, struct.pack("=II", 9, 1) + b"xx"),
    ],
)
async def test_migration_data_of_a_wrong_size_are_refused(
    moving: RawClient, command: int, payload: bytes
) -> None:
    await moving.do(FEATURE, state(STOP_COPY if command == MIG_READ else RESUMING))
    assert await moving.refused(command, payload) == errno.EINVAL


async def test_the_next_client_finds_a_card_that_runs(served: World, moving: RawClient) -> None:
    await moving.do(FEATURE, state(STOP_COPY))
    moving.close()
    assert await current(await served.client()) == RUNNING
