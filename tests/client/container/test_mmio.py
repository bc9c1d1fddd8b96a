"""A card's BAR for another device's DMA, in the cases of the kernel's own tests (tools/testing/selftests/
vfio/vfio_dma_mapping_mmio_test.c): the card is served by another process, the device that reaches it is a
function of this one, or a device of the real libvfio-user, which goes by message.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from errno import EFAULT
from pathlib import Path

import pytest
import trio

import client
from bench._servers import Server
from client.container import BarRange, Mode, open_container
from client.container.limits import PAGE
from client.mapping import BarMapping
from client.pci import Command, PciControl, read_config
from client.regions import RegionDetails
from device.errors import DeviceError
from protocol.vfio import RegionFlags, RegionIndex
from server import serve
from tests.client.container.believer import refused
from tests.client.lvu_device import lvu_device
from tests.server.world import Card
from tests.trionic.command import serving

IOVA = 1 << 32
PATIENCE = 30
LENGTH = 64
BUFFER = 0x1000
"""Where the device of libvfio-user has what it read, and writes from."""

USABLE = RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
MODES = pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)


@dataclass
class Reaching:
    """A device that does DMA where it is told: `reads` gives what it found, `writes` writes; both raise
    OSError or DeviceError where it cannot.
    """

    session: client.Session
    reads: Callable[[int, int], Awaitable[bytes]]
    writes: Callable[[int, bytes], Awaitable[None]]


@asynccontextmanager
async def a_function_of_ours(folder: Path) -> AsyncIterator[Reaching]:
    card = Card("reaching")
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, [(card.function, folder / "card.sock")])
        async with client.connect(folder / "card.sock") as session:

            async def reads(iova: int, length: int) -> bytes:
                return card.function.dma.read(iova, length)

            async def writes(iova: int, data: bytes) -> None:
                card.function.dma.write(iova, data)

            yield Reaching(session, reads, writes)
        nursery.cancel_scope.cancel()
    card.function.close()


@asynccontextmanager
async def a_device_of_libvfio_user(folder: Path) -> AsyncIterator[Reaching]:
    server = Server(lvu_device(), folder / "lvu.sock")
    try:
        await trio.to_thread.run_sync(server.wait_until_listening)
        async with client.connect(server.path) as session:

            async def transfer(iova: int, length: int, command: int) -> None:
                await session.region_write(RegionIndex.BAR0, 0, struct.pack("=QI", iova, length))
                await session.region_write(RegionIndex.BAR0, 12, struct.pack("=I", command))
                errno = int.from_bytes(await session.region_read(RegionIndex.BAR0, 16, 4), "little")
                if errno:
                    raise OSError(errno, os.strerror(errno))

            async def reads(iova: int, length: int) -> bytes:
                await transfer(iova, length, 1)
                return await session.region_read(RegionIndex.BAR0, BUFFER, length)

            async def writes(iova: int, data: bytes) -> None:
                await session.region_write(RegionIndex.BAR0, BUFFER, data)
                await transfer(iova, len(data), 2)

            yield Reaching(session, reads, writes)
    finally:
        server.stop()


DEVICES = pytest.mark.parametrize(
    "device", [a_function_of_ours, a_device_of_libvfio_user], ids=["ours", "libvfio-user"]
)
Device = Callable[[Path], AbstractAsyncContextManager[Reaching]]


@asynccontextmanager
async def a_card_and(device: Device, folder: Path) -> AsyncIterator[tuple[client.Session, Reaching]]:
    """The session of a card that answers at its BARs, and a device."""
    path = folder / "peer.sock"
    with trio.fail_after(PATIENCE), serving("--socket", path):
        async with client.connect(path) as card, device(folder) as reaching:
            await switch_memory(card, on=True)
            yield card, reaching


async def switch_memory(session: client.Session, *, on: bool) -> None:
    await PciControl(session, await read_config(session)).set_command(Command.MEMORY, on=on)


def largest_bar(session: client.Session) -> RegionDetails:
    """That a device may read and write, and that is mapped at all."""
    bars = [
        bar for bar in session.regions[: RegionIndex.BAR5 + 1] if bar.flags & USABLE == USABLE and bar.areas
    ]
    return max(bars, key=lambda bar: bar.size)


async def check_mapped(
    mode: Mode, card: client.Session, reaching: Reaching, mapping: BarMapping, offset: int, length: int
) -> None:
    """Map it, let the device read and write it, unmap it; in IOMMUFD it must be refused."""
    async with open_container(mode) as container:
        await container.attach(reaching.session)
        bar = BarRange(mapping, offset, length)
        if mode is Mode.IOMMUFD:
            assert await refused(container.map(IOVA, bar)) == EFAULT
            assert len(reaching.session.windows) == 0
            return
        entry = await container.map(IOVA, bar)
        content, other = os.urandom(LENGTH), os.urandom(LENGTH)
        await card.region_write(mapping.region.index, offset, content)
        assert await reaching.reads(IOVA, LENGTH) == content
        await reaching.writes(IOVA, other)
        assert await card.region_read(mapping.region.index, offset, LENGTH) == other
        assert await container.unmap(IOVA, length) == length
        assert not entry.mapped
        with pytest.raises((OSError, DeviceError)):
            await reaching.reads(IOVA, LENGTH)


@MODES
@DEVICES
async def test_map_full_bar(device: Device, mode: Mode, tmp_path: Path) -> None:
    async with a_card_and(device, tmp_path) as (card, reaching):
        bar = largest_bar(card)
        with BarMapping(bar, card.decoding) as mapping:
            await check_mapped(mode, card, reaching, mapping, 0, bar.size)


@MODES
@DEVICES
async def test_map_partial_bar(device: Device, mode: Mode, tmp_path: Path) -> None:
    async with a_card_and(device, tmp_path) as (card, reaching):
        bar = largest_bar(card)
        assert bar.size >= 2 * PAGE
        with BarMapping(bar, card.decoding) as mapping:
            await check_mapped(mode, card, reaching, mapping, bar.size // 2, bar.size // 2)


@MODES
@DEVICES
async def test_map_bar_misaligned(device: Device, mode: Mode, tmp_path: Path) -> None:
    async with a_card_and(device, tmp_path) as (card, reaching):
        bar = largest_bar(card)
        with BarMapping(bar, card.decoding, skew=PAGE) as mapping:
            await check_mapped(mode, card, reaching, mapping, 0, bar.size)


@pytest.mark.parametrize("mode", [Mode.TYPE1, Mode.TYPE1V2], ids=lambda mode: mode.value)
@DEVICES
async def test_no_device_reaches_a_bar_while_its_card_does_not_answer(
    device: Device, mode: Mode, tmp_path: Path
) -> None:
    async with a_card_and(device, tmp_path) as (card, reaching):
        bar = largest_bar(card)
        with BarMapping(bar, card.decoding) as mapping:
            async with open_container(mode) as container:
                await container.attach(reaching.session)
                await container.attach(card)  # the owner too
                await container.map(IOVA, BarRange(mapping, 0, bar.size))
                await reaching.writes(IOVA, b"before")
                await switch_memory(card, on=False)
                for session in (reaching.session, card):
                    assert len(session.windows) == 0
                with pytest.raises((OSError, DeviceError)):
                    await reaching.writes(IOVA, b"during")
                await switch_memory(card, on=True)
                assert await reaching.reads(IOVA, 6) == b"before"
                await reaching.writes(IOVA, b"after!")
                assert await card.region_read(bar.index, 0, 6) == b"after!"


@DEVICES
async def test_a_card_that_is_reset_comes_back_empty_and_reachable(device: Device, tmp_path: Path) -> None:
    async with a_card_and(device, tmp_path) as (card, reaching):
        bar = largest_bar(card)
        with BarMapping(bar, card.decoding) as mapping:
            async with open_container() as container:
                await container.attach(reaching.session)
                entry = await container.map(IOVA, BarRange(mapping, 0, PAGE))
                await reaching.writes(IOVA, b"before")
                await card.reset()
                assert not entry.present
                await switch_memory(card, on=True)
                await entry.wait_back()
                assert await reaching.reads(IOVA, 6) == bytes(6)
