"""Checks of REGION_READ."""

from __future__ import annotations

from typing import Final

from conformance._device import config, decode_memory, device_info, read, regions
from conformance._memory import PAGE
from conformance._messages import split
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, NotApplicable, Section, expect
from protocol import Command
from protocol.limits import DEFAULT_MAX_DATA_XFER_SIZE
from protocol.messages import RegionAccess
from protocol.vfio import RegionFlags, RegionIndex

section = Section("region-read", "VFIO_USER_REGION_READ")

CONFIG: Final = RegionIndex.CONFIG
TOP: Final = (1 << 64) - 1


@section.check(MUST)
async def reply(server: Server) -> None:
    """The reply repeats the record, and has the data."""
    async with server.session() as peer:
        await config(peer)
        for count in (1, 2, 4, 64):
            asked = RegionAccess(0, CONFIG, count)
            answer = await peer.granted(Command.REGION_READ, asked)
            body, data = split(answer, RegionAccess)
            good = body == asked and len(data) == count
            expect(good, f"{asked.pretty()} and {count} bytes", f"{body.pretty()} and {len(data)}")


@section.check(MUST)
async def same_in_any_width(server: Server) -> None:
    """Bytes, words and longer reads show the same configuration space."""
    async with server.session() as peer:
        await config(peer)
        whole = await read(peer, CONFIG, 0, 64)
        for width in (1, 2, 4):
            parts = [await read(peer, CONFIG, at, width) for at in range(0, 64, width)]
            expect(b"".join(parts) == whole, f"the same 64 bytes in reads of {width}", b"".join(parts).hex())


@section.check(MUST)
async def of_mappable_regions(server: Server) -> None:
    """Regions that can be mapped can be read by message as well."""
    async with server.session() as peer:
        mappable = [each for each in await regions(peer) if RegionFlags.MMAP in each.info.flags]
        if not mappable:
            raise NotApplicable("no region can be mapped")
        await decode_memory(peer)
        for region in mappable:
            await read(peer, region.index, 0, min(region.length, PAGE))


@section.check(MUST)
async def of_the_largest_size(server: Server) -> None:
    """A read of max_data_xfer_size is done."""
    async with server.session() as peer:
        await decode_memory(peer)
        most = peer.limit("max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE)
        for region in await regions(peer):
            if RegionFlags.MMAP in region.info.flags and not region.chain and region.length >= most:
                await read(peer, region.index, 0, min(most, DEFAULT_MAX_DATA_XFER_SIZE))
                return
        raise NotApplicable(f"no region of memory has {most} bytes")


@section.check(MUST)
async def of_too_much(server: Server) -> None:
    """A read of more than max_data_xfer_size is refused."""
    async with server.session() as peer:
        most = peer.limit("max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE)
        largest = max(await regions(peer), key=lambda region: region.length)
        for count in (most + 1, 0xFFFFFFFF):
            asked = RegionAccess(0, largest.index, count)
            await peer.refused(Command.REGION_READ, asked, what=f"{count} bytes of at most {most}")


@section.check(MUST)
async def beyond_the_region(server: Server) -> None:
    """A read that leaves its region is refused."""
    async with server.session() as peer:
        for region in await regions(peer):
            size = region.length
            if not size or RegionFlags.READ not in region.info.flags:
                continue
            for offset, count in ((size, 1), (size - 1, 2), (size + PAGE, 4)):
                asked = RegionAccess(offset, region.index, count)
                await peer.refused(Command.REGION_READ, asked, what=f"{asked.pretty()} of {size:#x}")


@section.check(MUST)
async def offset_wraps(server: Server) -> None:
    """A read whose end wraps around the address space is refused."""
    async with server.session() as peer:
        await config(peer)
        for offset, count in ((TOP, 2), (TOP - 3, 4), (1 << 63, 4)):
            asked = RegionAccess(offset, CONFIG, count)
            await peer.refused(Command.REGION_READ, asked, what=asked.pretty())


@section.check(MUST)
async def no_such_region(server: Server) -> None:
    """A region that is not there cannot be read."""
    async with server.session() as peer:
        count = (await device_info(peer)).num_regions
        for index in (count, 0xFFFFFFFF):
            await peer.refused(Command.REGION_READ, RegionAccess(0, index, 4), what=f"region {index}")


@section.check(MUST)
async def absent_region(server: Server) -> None:
    """A region without bytes cannot be read."""
    async with server.session() as peer:
        absent = [region.index for region in await regions(peer) if not region.length]
        if not absent:
            raise NotApplicable("every region has bytes")
        for index in absent:
            await peer.refused(Command.REGION_READ, RegionAccess(0, index, 4), what=f"empty region {index}")


@section.check(MUST)
async def unreadable_region(server: Server) -> None:
    """A region without READ cannot be read."""
    async with server.session() as peer:
        mute = [
            each for each in await regions(peer) if each.length and RegionFlags.READ not in each.info.flags
        ]
        if not mute:
            raise NotApplicable("every region can be read")
        for region in mute:
            asked = RegionAccess(0, region.index, 4)
            await peer.refused(Command.REGION_READ, asked, what=f"region {region.index} without READ")


@section.check(EXTENSION)
async def of_nothing(server: Server) -> None:
    """A read of no bytes is answered, and the stream stays in step."""
    async with server.session() as peer:
        await config(peer)
        await peer.ask(Command.REGION_READ, RegionAccess(0, CONFIG, 0))
        await peer.quiet("what was answered")


@section.check(MUST)
async def refusal_is_header_only(server: Server) -> None:
    """The refusal of a read is the header alone."""
    async with server.session() as peer:
        size = (await config(peer)).length
        asked = RegionAccess(size, CONFIG, 4)
        bad = await peer.refused(Command.REGION_READ, asked, what="a read beyond its region")
        expect(not bad.payload, "a header alone", bad)
