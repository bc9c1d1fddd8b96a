from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import EINVAL, EIO

import pytest

import client
from client._pages import PAGE
from client.device_file import DeviceFile, PositionError
from client.mapping import MappingError, MappingState
from protocol.region_offsets import INDICES, encode
from protocol.vfio import RegionIndex
from tests.client import pci_device as pci
from tests.client.bar_files import memory
from tests.client.pci_device import Device, pci_device
from tests.client.peer import FakeRegion, session_with

CONFIG = encode(RegionIndex.CONFIG)


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[DeviceFile, Device]]:
    async with pci_device() as device:
        yield DeviceFile(device.session), device


async def test_a_region_is_read_and_written_at_its_place() -> None:
    async with opened() as (file, device):
        assert await file.pread(2, CONFIG) == b"\xf4\x1a"
        assert await file.pread(2, CONFIG + 2) == b"\x41\x10"
        assert await file.pwrite(b"\1\2", encode(RegionIndex.BAR0, 0x10)) == 2
        assert device.log == [(0, 0x10, b"\1\2")]


async def test_what_goes_beyond_the_end_of_a_region_is_cut_there() -> None:
    async with opened() as (file, device):
        assert await file.pread(100, CONFIG + 0xFE) == b"\0\0"
        assert await file.pwrite(bytes(100), encode(0, pci.SIZE - 3)) == 3
        assert device.log == [(0, pci.SIZE - 3, bytes(3))]


@pytest.mark.parametrize(
    "position",
    [CONFIG + 0x100, encode(0, pci.SIZE), encode(1), encode(9), encode(INDICES - 1), -1, 1 << 63],
)
async def test_there_is_nothing_elsewhere(position: int) -> None:
    async with opened() as (file, device):
        with pytest.raises(PositionError, match=r"nothing at|not a position") as refusal:
            await file.pread(1, position)
        assert refusal.value.errno == EINVAL
        with pytest.raises(PositionError):
            await file.pwrite(b"\0", position)
        with pytest.raises(MappingError) as cannot:
            file.mmap(PAGE, position)
        assert cannot.value.errno == EINVAL
        assert device.log == []


async def test_a_write_to_command_takes_the_mappings_away_by_this_file_too() -> None:
    async with opened() as (file, device):
        with file.mmap(PAGE, encode(0)) as mapping, mapping.view(0, 4) as view:
            assert bytes(view) == b"here"
            await file.pwrite(pci.MEMORY_OFF, CONFIG + pci.COMMAND)
            assert bytes(view) == b"\xff" * 4
            assert mapping.state is MappingState.ZAPPED
            device.bar_errno = EIO
            with pytest.raises(client.ServerError, match="EIO"):
                await file.pread(4, encode(0))


async def test_part_of_a_bar_is_mapped_where_it_lies() -> None:
    async with opened() as (file, _):
        with file.mmap(2 * PAGE, encode(0, PAGE)) as mapping:
            assert (mapping.offset, mapping.length) == (PAGE, 2 * PAGE)
            assert mapping.state is MappingState.FAULTABLE
            assert mapping.covers(PAGE, 2 * PAGE)
            assert not mapping.covers(0, 4)


@pytest.mark.parametrize("length", [0x100, PAGE])
async def test_the_last_page_is_mapped_even_if_the_bar_ends_within_it(length: int) -> None:
    with memory(0x100) as fd:
        async with pci_device(bar=FakeRegion(0x100, 7, b"", (fd,))) as device:
            file = DeviceFile(device.session)
            with file.mmap(length, encode(0)) as mapping:
                mapping.write(0xFC, 4, 7)
                assert mapping.covers(0, length)
            with pytest.raises(MappingError, match="cannot be mapped") as refusal:
                file.mmap(PAGE + 1, encode(0))
            assert refusal.value.errno == EINVAL


@pytest.mark.parametrize(
    ("position", "length"),
    [
        (encode(0), pci.SIZE + PAGE),
        (encode(0, PAGE), pci.SIZE),
        (encode(0), 0),
        (encode(0, 0x800), PAGE),
        (CONFIG, PAGE),
    ],
    ids=["past its end", "past its end from within", "nothing", "within a page", "configuration space"],
)
async def test_what_the_kernel_does_not_map_is_refused(position: int, length: int) -> None:
    async with opened() as (file, _):
        with pytest.raises(MappingError) as refusal:
            file.mmap(length, position)
        assert refusal.value.errno == EINVAL


async def test_the_rom_and_what_comes_after_it_are_not_mapped_even_if_they_could_be() -> None:
    with memory(PAGE) as fd:
        regions = dict.fromkeys((5, 6, 7, 8), FakeRegion(PAGE, 7, b"", (fd,)))
        async with session_with(regions=regions) as (session, _):
            file = DeviceFile(session)
            file.mmap(PAGE, encode(5)).close()
            for index in (6, 7, 8):
                with pytest.raises(MappingError, match="nothing can be mapped") as refusal:
                    file.mmap(PAGE, encode(index))
                assert refusal.value.errno == EINVAL


async def test_a_bar_that_cannot_be_mapped_is_refused() -> None:
    async with pci_device(bar=FakeRegion(pci.SIZE)) as device:
        with pytest.raises(MappingError, match="cannot be mapped") as refusal:
            DeviceFile(device.session).mmap(PAGE, encode(0))
        assert refusal.value.errno == EINVAL
