"""A card that takes its memory back, over a real socket, whoever speaks vfio-user."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import server.libvfio_user
from device.function import Identity, MemoryBar, PciFunction, Revocation
from server import serve
from tests.device.pci.mapped import Mapping, mapped
from tests.server.raw import (
    CONFIG,
    EVENTFD,
    GET_REGION_INFO,
    MSIX,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    TRIGGER,
    WRITE_MULTI,
    RawClient,
    access,
    connect,
    irqs,
    message,
)
from tests.server.world import BAR2_SIZE, PAGE, Card, World, world
from trionic.engines import Engine

COMMAND, MEMORY = 0x04, 1 << 1
POWER, D0, D3_HOT = 0x44, 0, 3
TABLE = 0x400
ROOM = 4096  # bytes: libvfio-user gives no descriptor where its list of areas does not fit
MMAP = 1 << 2  # VFIO_REGION_INFO_FLAG_MMAP

Serve = Callable[..., Awaitable[None]]

TOUCH = "import mmap, os; m = mmap.mmap({fd}, {size}); os.write(1, m[:1]); os.read(0, 1); os.write(1, m[:1])"


@pytest.fixture(params=Engine)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Who speaks vfio-user."""
    assert isinstance(request.param, Engine)
    return request.param


@pytest.fixture
def by(engine: Engine, request: pytest.FixtureRequest) -> Serve:
    """What serves cards by this engine."""
    if engine is Engine.NATIVE:
        return serve
    library = server.libvfio_user.Library(request.getfixturevalue("libvfio_user").library)
    return partial(server.libvfio_user.serve, library=library)


@pytest.fixture
async def served(by: Serve, tmp_path: Path) -> AsyncIterator[World]:
    """A card that takes its memory back."""
    async with world(tmp_path, by=by, card=Card(revocation=Revocation.ENFORCED)) as made:
        yield made


async def command(client: RawClient, value: int) -> None:
    await client.write(CONFIG, COMMAND, struct.pack("=H", value))


async def power(client: RawClient, state: int) -> None:
    await client.write(CONFIG, POWER, bytes([state, 0]))


async def error_of(client: RawClient, request: int, payload: bytes) -> int:
    """The errno with which a request is refused, in an error reply of any length (libvfio-user pads its)."""
    await client.send(message(request, payload))
    reply = await client.receive()
    assert reply is not None
    return reply.error


async def region(client: RawClient, index: int) -> tuple[int, int, int]:
    """Flags and size of a region, and its descriptor, the caller's; -1 for none."""
    reply = await client.do(GET_REGION_INFO, struct.pack("=IIIIQQ", ROOM, 0, index, 0, 0, 0))
    _, flags, _, _, size, _ = reply.unpack("IIIIQQ")
    return flags, size, reply.fds[0] if reply.fds else -1


@contextmanager
def owned(fd: int) -> Iterator[int]:
    try:
        yield fd
    finally:
        os.close(fd)


async def mapped_by(client: RawClient) -> Mapping:
    """The client's mapping of BAR 2, whose memory is decoded now."""
    await command(client, MEMORY)
    _, size, fd = await region(client, 2)
    with owned(fd):
        return Mapping(fd, size)


async def test_a_fresh_client_is_offered_a_mapping_in_which_nothing_is_yet(served: World) -> None:
    client = await served.client()
    flags, size, fd = await region(client, 2)
    with owned(fd):
        assert (flags & MMAP, size, os.fstat(fd).st_size) == (MMAP, BAR2_SIZE, 0)
        await command(client, MEMORY)
        with mapped(fd, size) as mapping:
            await client.write(2, PAGE, b"by message")
            assert mapping.load(PAGE, 10) == b"by message"
            mapping.store(0, b"by mapping")
            assert await client.read(2, 0, 10) == b"by mapping"


async def test_by_message_eio_after_disable_for_every_bar_and_for_no_other_region(served: World) -> None:
    client = await served.client()
    for value, error in ((0, errno.EIO), (MEMORY, 0), (0, errno.EIO)):
        await command(client, value)
        for index, offset in ((0, 0), (0, TABLE), (2, 0)):
            assert await error_of(client, REGION_READ, access(offset, index, 4)) == error
            assert await error_of(client, REGION_WRITE, access(offset, index, 4) + bytes(4)) == error
        assert len(await client.read(CONFIG, 0, 64)) == 64
    client.close()


async def test_access_after_disable_is_sigbus_in_a_process_that_maps_the_descriptor(served: World) -> None:
    client = await served.client()
    await command(client, MEMORY)
    _, size, fd = await region(client, 2)
    with owned(fd):
        child = await trio.lowlevel.open_process(
            [sys.executable, "-c", TOUCH.format(fd=fd, size=size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[fd],
        )
        assert child.stdin is not None
        assert child.stdout is not None
        async with child.stdout, child.stdin:
            try:
                assert await child.stdout.receive_some() == b"\0"
                await command(client, 0)
                await child.stdin.send_all(b".")
                assert await child.wait() == -signal.SIGBUS
            finally:
                child.kill()


async def test_re_enabled_the_same_pages_are_there(served: World) -> None:
    client = await served.client()
    mapping = await mapped_by(client)
    mapping.store(PAGE, b"kept")
    for switch, off, on in ((command, 0, MEMORY), (power, D3_HOT, D0)):
        await switch(client, off)
        assert mapping.load(PAGE) is None
        await switch(client, on)
        assert mapping.load(PAGE, 4) == b"kept"
        assert await client.read(2, PAGE, 4) == b"kept"
    mapping.close()


async def test_device_reset_takes_mappings_away_and_leaves_zeros(served: World) -> None:
    client = await served.client()
    mapping = await mapped_by(client)
    mapping.store(PAGE, b"secret")
    await client.do(RESET)
    assert mapping.load(PAGE) is None
    await command(client, MEMORY)
    assert mapping.load(PAGE, 6) == bytes(6)
    mapping.close()


async def test_a_function_level_reset_takes_mappings_away_and_leaves_zeros(served: World) -> None:
    client = await served.client()
    mapping = await mapped_by(client)
    mapping.store(PAGE, b"secret")
    express = served.function.capabilities[-1]
    await client.write(CONFIG, express.at("DEVICE_CONTROL"), struct.pack("=H", 1 << 15))
    assert mapping.load(PAGE) is None
    await command(client, MEMORY)
    assert mapping.load(PAGE, 6) == bytes(6)
    mapping.close()


async def test_what_a_client_that_left_has_mapped_faults_and_the_next_one_finds_zeros(served: World) -> None:
    first = await served.client()
    mapping = await mapped_by(first)
    mapping.store(0, b"secret")
    first.close()
    second = await served.client()
    assert mapping.load(0) is None
    other = await mapped_by(second)
    assert (other.load(0, 6), mapping.load(0)) == (bytes(6), None)
    mapping.close()
    other.close()


async def test_a_client_that_cuts_its_file_hears_all_ones_and_the_server_goes_on(served: World) -> None:
    client = await served.client()
    await command(client, MEMORY)
    _, _, fd = await region(client, 2)
    with owned(fd):
        await client.write(2, 0, b"x")
        for length in (0, 1, PAGE):
            os.ftruncate(fd, length)
            assert await client.read(2, PAGE, 4) == b"\xff" * 4
            await client.write(2, PAGE, b"gone")
        await client.do(RESET)
        await command(client, MEMORY)
        assert await client.read(2, PAGE, 4) == bytes(4)


async def test_vectors_are_wired_while_memory_is_off(served: World) -> None:
    client = await served.client()
    with owned(os.eventfd(0, os.EFD_NONBLOCK)) as fd:
        await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, 1), [fd])
        await client.write(CONFIG, served.function.capabilities[2].at("CONTROL"), struct.pack("=H", 1 << 15))
        with served.function.gate:
            served.function.interrupts.signal(0)
        with trio.fail_after(5):
            await trio.lowlevel.wait_readable(fd)
        assert os.eventfd_read(fd) == 1


async def test_writes_in_one_message_are_done_until_memory_is_switched_off(tmp_path: Path) -> None:
    async with world(tmp_path, card=Card(revocation=Revocation.ENFORCED)) as served:
        client = await connect(served.path)
        await client.negotiate({"write_multiple": True})
        served.clients.callback(client.close)
        writes = [
            (CONFIG, COMMAND, struct.pack("=H", MEMORY)),
            (2, 8, b"x" * 8),
            (CONFIG, COMMAND, bytes(2)),
            (2, 16, b"y" * 8),
        ]
        data = b"".join(
            struct.pack("=QII", offset, index, len(data)) + data.ljust(8, b"\0")
            for index, offset, data in writes
        )
        (done,) = (await client.do(WRITE_MULTI, struct.pack("=Q", len(writes)) + data)).unpack("Q")
        assert done == 3
        await command(client, MEMORY)
        assert await client.read(2, 8, 16) == b"x" * 8 + bytes(8)


@pytest.mark.parametrize("revocation", Revocation)
async def test_small_bars_and_bars_with_less_memory_are_told_and_mapped_as_they_are(
    by: Serve, tmp_path: Path, revocation: Revocation
) -> None:
    small = MemoryBar(0, 0x100, revocation=revocation)
    partly = MemoryBar(2, 4 * PAGE, revocation=revocation, backing=2 * PAGE)
    function = PciFunction("card", Identity(1, 2, 3, 4), bars=[small, partly])
    path = tmp_path / "card.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(by, [(function, path)]))
        client = await connect(path)
        (await client.negotiate()).close()
        await command(client, MEMORY)
        for index, size, length in ((0, 0x100, PAGE), (2, 4 * PAGE, 2 * PAGE)):
            flags, told, fd = await region(client, index)
            with owned(fd), mapped(fd, length) as mapping:
                assert (flags & MMAP, told, os.fstat(fd).st_size) == (MMAP, size, length)
                await client.write(index, 0xFC, b"last")
                assert mapping.load(0xFC, 4) == b"last"
        assert await error_of(client, REGION_READ, access(0x100, 0, 1)) == errno.EINVAL
        assert await client.read(2, 2 * PAGE - 2, 4) == b"\0\0\xff\xff"
        await client.write(2, 3 * PAGE, b"dropped")
        assert await client.read(2, 3 * PAGE, 7) == b"\xff" * 7
        assert await error_of(client, REGION_READ, access(4 * PAGE, 2, 1)) == errno.EINVAL
        client.close()
        nursery.cancel_scope.cancel()
    function.close()
