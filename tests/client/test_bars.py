from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

import client
from client.mapping import BarMapping
from client.regions import RegionDetails
from protocol.vfio import RegionFlags
from tests.client.peer import NO_REPLY, REGION_READ, REGION_WRITE, FakeRegion, session_with
from tests.client.test_connecting import sparse

RWM = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP


@contextmanager
def memory(size: int) -> Iterator[int]:
    """A memfd of so many bytes."""
    fd = os.memfd_create("bar")
    os.truncate(fd, size)
    yield fd
    os.close(fd)


def test_loads_and_stores_are_those_of_the_memory() -> None:
    with memory(0x3000) as fd:
        region = RegionDetails(2, 0x2000, RWM, 0x1000, ((0, 0x2000),), (), fd)
        with BarMapping(region) as bar:
            bar.write(0x1008, 8, 0x1122334455667788)
            assert os.pread(fd, 8, 0x2008) == struct.pack("=Q", 0x1122334455667788)
            os.pwrite(fd, b"\xaa\xbb\xcc\xdd", 0x1000)
            assert bar.read(0, 1) == 0xAA
            assert bar.read(2, 2) == struct.unpack("=H", b"\xcc\xdd")[0]
            assert bar.read(0, 4) == struct.unpack("=I", b"\xaa\xbb\xcc\xdd")[0]
            bar.view(0x10, 3)[:] = b"xyz"
            assert os.pread(fd, 3, 0x1010) == b"xyz"


def test_only_sparse_areas_are_mapped() -> None:
    with memory(0x8000) as fd:
        region = RegionDetails(0, 0x8000, RWM, 0, ((0x1000, 0x1000), (0x4000, 0x2000)), (), fd)
        with BarMapping(region) as bar:
            assert not bar.covers(0, 4)
            assert bar.covers(0x1000, 0x1000)
            assert not bar.covers(0x1FFC, 8)
            assert not bar.covers(0x2000, 1)
            assert bar.covers(0x5FF8, 8)
            with pytest.raises(client.ClientError, match="not mapped"):
                bar.read(0x3000, 4)
            with pytest.raises(client.ClientError, match="not mapped"):
                bar.view(0x1800, 0x1000)


def test_an_access_must_be_aligned() -> None:
    with memory(0x1000) as fd, BarMapping(RegionDetails(0, 0x1000, RWM, 0, ((0, 0x1000),), (), fd)) as bar:
        with pytest.raises(client.ClientError, match="not aligned"):
            bar.read(1, 2)
        with pytest.raises(client.ClientError, match="not aligned"):
            bar.read(2, 4)
        with pytest.raises(client.ClientError, match="not aligned"):
            bar.write(4, 8, 0)


def test_the_last_bytes_of_an_odd_length_are_reached() -> None:
    region = RegionDetails(0, 0x1000, RWM, 0, ((0, 0x7FF),), (), -1)
    with memory(0x1000) as fd:
        region.fd = fd
        os.pwrite(fd, b"\1\2\3\4\5\6\7", 0x7F8)
        with BarMapping(region) as bar:
            assert bar.read(0x7FE, 1) == 7
            assert bar.read(0x7FC, 2) == struct.unpack("=H", b"\5\6")[0]
            assert bar.read(0x7F8, 4) == struct.unpack("=I", b"\1\2\3\4")[0]
            with pytest.raises(client.ClientError, match="not mapped"):
                bar.read(0x7F8, 8)


def test_a_file_that_shrinks_before_it_is_faulted_in_is_refused() -> None:
    with memory(0x1000) as fd, BarMapping(RegionDetails(0, 0x1000, RWM, 0, ((0, 0x1000),), (), fd)) as bar:
        os.truncate(fd, 0)
        with pytest.raises(client.MappingError, match="ends at 0x0"):
            bar.read(0, 4)


def test_a_read_only_region_stays_so() -> None:
    flags = RegionFlags.READ | RegionFlags.MMAP
    with memory(0x1000) as fd, BarMapping(RegionDetails(0, 0x1000, flags, 0, ((0, 0x1000),), (), fd)) as bar:
        assert bar.read(0, 4) == 0
        with pytest.raises(client.ClientError, match="read-only"):
            bar.write(0, 4, 1)


@pytest.mark.parametrize(
    ("size", "offset", "areas"),
    [
        (0x1000, 0, ((0, 0x2000),)),
        (0x2000, 0x1000, ((0, 0x2000),)),
        (0x4000, 0, ((0x800, 0x800),)),
        (0x4000, 1, ((0xFFF, 0x1000),)),
    ],
)
def test_a_mapping_that_would_fault_later_is_refused(
    size: int, offset: int, areas: tuple[tuple[int, int], ...]
) -> None:
    with memory(size) as fd, pytest.raises(client.ClientError):
        BarMapping(RegionDetails(0, 0x4000, RWM, offset, areas, (), fd))


def test_a_region_without_descriptor_is_not_mapped() -> None:
    with pytest.raises(client.ClientError, match="cannot be mapped"):
        BarMapping(RegionDetails(0, 0x4000, RWM, 0, (), ()))


def test_unmapping_waits_for_views() -> None:
    with memory(0x1000) as fd:
        bar = BarMapping(RegionDetails(0, 0x1000, RWM, 0, ((0, 0x1000),), (), fd))
        view = bar.view(0, 8)
        with pytest.raises(BufferError):
            bar.close()
        with pytest.raises(client.ClientError, match="not mapped"):
            bar.read(0, 4)
        view.release()
        bar.close()


async def test_a_bar_uses_its_mapping_where_it_can_and_messages_elsewhere() -> None:
    with memory(0x4000) as fd:
        regions = {0: FakeRegion(0x4000, 7, sparse((0x3000, 0x1000)), (fd,))}
        async with session_with(regions=regions) as (session, peer), trio.open_nursery() as nursery:

            async def serve() -> None:
                message = await peer.expect(REGION_READ)
                assert message.payload == struct.pack("=QII", 0x14, 0, 1)
                peer.reply(message, message.payload + b"\x0f")
                message = await peer.expect(REGION_WRITE)
                assert message.payload == struct.pack("=QII", 0x16, 0, 2) + struct.pack("=H", 0x1234)
                peer.reply(message, message.payload[:16])
                message = await peer.expect(REGION_WRITE)
                assert message.flags == NO_REPLY
                assert message.payload == struct.pack("=QII", 0x18, 0, 4) + struct.pack("=I", 7)

            nursery.start_soon(serve)
            with client.Bar(session, 0) as bar:
                assert await bar.read(0x14, 1) == 0x0F
                await bar.write(0x16, 2, 0x1234)
                bar.post(0x18, 4, 7)
                bar.post(0x3000, 2, 0xBEEF)
                await bar.write(0x3004, 4, 0xCAFE)
                assert os.pread(fd, 8, 0x3000) == struct.pack("=HHI", 0xBEEF, 0, 0xCAFE)
                assert await bar.read(0x3000, 2) == 0xBEEF


async def test_a_bar_that_is_not_there_is_refused() -> None:
    async with session_with() as (session, _):
        with pytest.raises(client.ClientError, match="no region 3"):
            client.Bar(session, 3)
