"""Checks of exports of BARs, which are the kernel's (drivers/vfio/pci/vfio_pci_dmabuf.c) and not in the text:
a server that exports nothing is not measured by them.
"""

from __future__ import annotations

import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import EINVAL, ENODEV, EOVERFLOW

from conformance._device import COMMAND, MEMORY_SPACE, Region, decode_memory, read, regions, write
from conformance._features import GET, PROBE, get
from conformance._memory import PAGE
from conformance._messages import Message, split
from conformance._peer import Peer
from conformance._server import Server
from conformance.checks import EXTENSION, Failed, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import DeviceFeature, DmaBuf, DmaBufRange
from protocol.region_info import mappable_areas, parse_capabilities_chain
from protocol.vfio import Feature, FeatureFlags, RegionIndex

section = Section("dma-buf", "VFIO_DEVICE_FEATURE_DMA_BUF (linux/vfio.h)")


@asynccontextmanager
async def _exporting(server: Server, *, pages: int = 1) -> AsyncIterator[tuple[Peer, Region, int]]:
    """A session with a BAR that can be exported, and where so many mappable pages of it begin."""
    async with server.session() as peer:
        flags = FeatureFlags(PROBE | GET | Feature.DMA_BUF)
        if (await peer.ask(Command.DEVICE_FEATURE, DeviceFeature(DeviceFeature.size, flags))).refused:
            raise NotApplicable("the server does not export BARs")
        await decode_memory(peer)
        for region in (await regions(peer))[: RegionIndex.ROM]:
            if region.fds:
                for offset, length in mappable_areas(
                    region.info, parse_capabilities_chain(region.info, region.chain)
                ):
                    if length >= pages * PAGE:
                        yield peer, region, offset
                        return
        raise NotApplicable(f"no BAR has {pages} pages that can be mapped")


def _data(index: int, *ranges: tuple[int, int], flags: int = 0, count: int | None = None) -> bytes:
    head = DmaBuf(index, 0, flags, len(ranges) if count is None else count)
    return head.encode() + b"".join(DmaBufRange(*one).encode() for one in ranges)


async def _granted(peer: Peer, data: bytes) -> Message:
    """The answer to an export that must be granted: what was asked for, and one descriptor."""
    reply = await get(peer, Feature.DMA_BUF, data)
    expect(not reply.refused, "that DMA_BUF is granted", reply)
    _, said = split(reply, DeviceFeature)
    expect(said == data, f"{data.hex()} again", said.hex())
    expect(len(reply.fds) == 1, "one descriptor", reply)
    return reply


async def _refused(peer: Peer, data: bytes, what: str, errno: int | None = None) -> None:
    asked = DeviceFeature(1 << 16, FeatureFlags(GET | Feature.DMA_BUF)).encode() + data
    await peer.refused(Command.DEVICE_FEATURE, asked, what=what, errno=errno)


@section.check(EXTENSION)
async def repeated(server: Server) -> None:
    """An export is answered with the data of its request and one descriptor."""
    async with _exporting(server) as (peer, region, offset):
        await _granted(peer, _data(region.index, (offset, PAGE)))


@section.check(EXTENSION)
async def memory(server: Server) -> None:
    """The descriptor of an export shows the BAR's memory, where the region's own would."""
    async with _exporting(server) as (peer, region, offset):
        reply = await _granted(peer, _data(region.index, (offset, PAGE)))
        at = region.info.offset + offset
        try:
            theirs = mmap.mmap(reply.fds[0], PAGE, prot=mmap.PROT_READ, offset=at)
        except (OSError, ValueError) as error:
            raise Failed(f"that {at:#x}+{PAGE:#x} of the descriptor can be mapped", str(error)) from None
        with theirs:
            by_message = await read(peer, region.index, offset, 64)
            expect(theirs[:64] == by_message, f"{by_message.hex()} by mapping", theirs[:64].hex())


@section.check(EXTENSION)
async def several_ranges(server: Server) -> None:
    """Several parts of a BAR are exported together, in any order."""
    async with _exporting(server, pages=2) as (peer, region, offset):
        await _granted(peer, _data(region.index, (offset + PAGE, PAGE), (offset, PAGE)))


@section.check(EXTENSION)
async def while_memory_is_off(server: Server) -> None:
    """A BAR can be exported while its memory is not decoded."""
    async with _exporting(server) as (peer, region, offset):
        before = await read(peer, RegionIndex.CONFIG, COMMAND, 2)
        await write(peer, RegionIndex.CONFIG, COMMAND, bytes([before[0] & ~MEMORY_SPACE, before[1]]))
        await _granted(peer, _data(region.index, (offset, PAGE)))
        await write(peer, RegionIndex.CONFIG, COMMAND, before)


@section.check(EXTENSION)
async def no_ranges(server: Server) -> None:
    """An export of no ranges is refused with EINVAL, whatever else is wrong with it."""
    async with _exporting(server) as (peer, region, _):
        for index in (region.index, RegionIndex.ROM):
            await _refused(peer, _data(index), f"no ranges of region {index}", EINVAL)


@section.check(EXTENSION)
async def undefined_flags(server: Server) -> None:
    """Flags are not defined: an export with some is refused with EINVAL."""
    async with _exporting(server) as (peer, region, offset):
        for flags in (1, 1 << 31):
            await _refused(
                peer, _data(region.index, (offset, PAGE), flags=flags), f"flags {flags:#x}", EINVAL
            )


@section.check(EXTENSION)
async def no_such_bar(server: Server) -> None:
    """An export of what is no BAR is refused with ENODEV, whatever is wrong with its ranges."""
    async with _exporting(server) as (peer, _, _):
        absent = [region.index for region in await regions(peer) if not region.length]
        for index in {*absent, RegionIndex.ROM, RegionIndex.CONFIG, 0xFFFFFFFF}:
            for span in ((0, PAGE), (1, 0)):
                await _refused(peer, _data(index, span), f"region {index}", ENODEV)


@section.check(EXTENSION)
async def whole_pages(server: Server) -> None:
    """Ranges are whole pages and not empty: others are refused with EINVAL."""
    async with _exporting(server) as (peer, region, offset):
        for span in ((offset, 0), (offset + 1, PAGE), (offset, PAGE - 1), (offset, 1)):
            await _refused(peer, _data(region.index, span), f"{span[0]:#x}+{span[1]:#x}", EINVAL)
            both = _data(region.index, (offset, PAGE), span)
            await _refused(peer, both, f"{span[0]:#x}+{span[1]:#x} behind a page", EINVAL)


@section.check(EXTENSION)
async def outside(server: Server) -> None:
    """A range that reaches beyond its BAR is refused with EINVAL."""
    async with _exporting(server) as (peer, region, offset):
        end = -(-region.length // PAGE) * PAGE
        for span in ((end, PAGE), (offset, end - offset + PAGE), (1 << 40, PAGE)):
            await _refused(peer, _data(region.index, span), f"{span[0]:#x}+{span[1]:#x}", EINVAL)


@section.check(EXTENSION)
async def wraps(server: Server) -> None:
    """A range that wraps is refused with EOVERFLOW; ranges whose lengths wrap together, with EINVAL."""
    async with _exporting(server) as (peer, region, _):
        last = (1 << 64) - PAGE
        await _refused(peer, _data(region.index, (last, 2 * PAGE)), "a range that wraps", EOVERFLOW)
        together = _data(region.index, (0, 1 << 63), (0, 1 << 63))
        await _refused(peer, together, "ranges that wrap together", EINVAL)


@section.check(EXTENSION)
async def ranges_that_are_not_there(server: Server) -> None:
    """An export that names more ranges than its message has is refused."""
    async with _exporting(server) as (peer, region, offset):
        for count in (2, 0xFFFFFFFF):
            data = _data(region.index, (offset, PAGE), count=count)
            await _refused(peer, data, f"{count} ranges, of which one is there")


@section.check(EXTENSION)
async def little_room(server: Server) -> None:
    """An export whose answer is longer than its request allows is refused, and brings no descriptor."""
    async with _exporting(server) as (peer, region, offset):
        data = _data(region.index, (offset, PAGE))
        room = DeviceFeature.size + len(data) - 1
        asked = DeviceFeature(room, FeatureFlags(GET | Feature.DMA_BUF)).encode() + data
        await peer.refused(Command.DEVICE_FEATURE, asked, what=f"argsz {room}")
