"""Checks of what regions are said to be, and of what of them can be mapped."""

from __future__ import annotations

import mmap
from typing import Final

from conformance._device import MOST_INDEXES, ROOM, Region, decode_memory, device_info, read, regions
from conformance._memory import PAGE
from conformance._messages import split
from conformance._peer import CAPABILITIES
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, Failed, NotApplicable, Section, expect
from protocol import Command, RemoteProtocolError
from protocol.messages import RegionInfo
from protocol.region_info import SparseMmap, UnknownCapability, mappable_areas, parse_capabilities_chain
from protocol.vfio import RegionCapability, RegionFlags, RegionIndex

section = Section("region-info", "VFIO_USER_DEVICE_GET_REGION_INFO")

CONFIG_SIZES: Final = (256, 4096)
LARGEST_MAPPING: Final = 1 << 30
"""Bytes that a check maps at most."""


def _areas(region: Region) -> tuple[tuple[int, int], ...]:
    """What may be mapped; `Failed` where the chain is malformed."""
    try:
        return mappable_areas(region.info, parse_capabilities_chain(region.info, region.chain))
    except RemoteProtocolError as error:
        raise Failed(f"a well-formed description of region {region.index}", error.reason) from None


@section.check(MUST)
async def every_index(server: Server) -> None:
    """Each region is described, its index again."""
    async with server.session() as peer:
        for index in range(min((await device_info(peer)).num_regions, MOST_INDEXES)):
            asked = RegionInfo(ROOM, index=index)
            body, _ = split(await peer.granted(Command.DEVICE_GET_REGION_INFO, asked), RegionInfo)
            expect(body.index == index, f"index {index}", body.pretty())


@section.check(MUST)
async def beyond(server: Server) -> None:
    """An index that is not there is refused."""
    async with server.session() as peer:
        count = (await device_info(peer)).num_regions
        for index in (count, count + 1, 0xFFFFFFFF):
            asked = RegionInfo(RegionInfo.size, index=index)
            await peer.refused(Command.DEVICE_GET_REGION_INFO, asked, what=f"index {index} of {count}")


@section.check(MUST)
async def argsz(server: Server) -> None:
    """argsz of the reply is what the whole payload takes, and that is there if the request allows it."""
    async with server.session() as peer:
        for region in await regions(peer):
            size = RegionInfo.size + len(region.chain)
            expect(region.info.argsz == size, f"argsz {size}, the size of the payload", region.info.pretty())


@section.check(MUST)
async def little_room(server: Server) -> None:
    """A description longer than the request allows is cut to the record, and argsz tells the need."""
    async with server.session() as peer:
        long = [region for region in await regions(peer) if region.chain]
        if not long:
            raise NotApplicable("no region has capabilities")
        for region in long:
            asked = RegionInfo(RegionInfo.size, index=region.index)
            answer = await peer.granted(Command.DEVICE_GET_REGION_INFO, asked)
            body, rest = split(answer, RegionInfo)
            good = body.argsz == region.info.argsz and not rest
            expect(good, f"32 bytes with argsz {region.info.argsz}", f"{body.pretty()} and {len(rest)} bytes")


@section.check(EXTENSION)
async def no_capabilities_at_offset_zero(server: Server) -> None:
    """CAPS is not set without a cap_offset: QEMU refuses that."""
    async with server.session() as peer:
        for region in await regions(peer):
            asked = RegionInfo(RegionInfo.size, index=region.index)
            body, _ = split(await peer.granted(Command.DEVICE_GET_REGION_INFO, asked), RegionInfo)
            good = RegionFlags.CAPS not in body.flags or body.cap_offset
            expect(good, "no CAPS without cap_offset", body.pretty())


@section.check(EXTENSION)
async def small_argsz(server: Server) -> None:
    """An argsz below the size of the record is refused, as the kernel does."""
    async with server.session() as peer:
        asked = RegionInfo(RegionInfo.size - 1)
        await peer.refused(Command.DEVICE_GET_REGION_INFO, asked, what="argsz 31 of 32")


@section.check(SHOULD)
async def flags(server: Server) -> None:
    """No flags are set that are not defined."""
    async with server.session() as peer:
        for region in await regions(peer):
            good = int(region.info.flags) & ~0xF == 0
            expect(good, f"bits 0 to 3 alone, for region {region.index}", region.info.pretty())


@section.check(MUST)
async def config_space(server: Server) -> None:
    """Region 7 is the configuration space: 256 or 4096 bytes that can be read and written."""
    async with server.session() as peer:
        found = await regions(peer)
        if len(found) <= RegionIndex.CONFIG:
            raise NotApplicable("the device has no region 7")
        info = found[RegionIndex.CONFIG].info
        expect(info.length in CONFIG_SIZES, "256 or 4096 bytes", info.pretty())
        both = RegionFlags.READ | RegionFlags.WRITE
        expect(info.flags & both == both, "READ and WRITE", info.pretty())


@section.check(EXTENSION)
async def power_of_two(server: Server) -> None:
    """A BAR's size is a power of two, for PCI has no others."""
    async with server.session() as peer:
        for region in (await regions(peer))[: RegionIndex.ROM]:
            good = region.length & (region.length - 1) == 0
            expect(good, f"a power of two as the size of region {region.index}", region.length)


@section.check(MUST)
async def descriptor(server: Server) -> None:
    """The reply has a descriptor where the region can be mapped, and only there."""
    async with server.session() as peer:
        for region in await regions(peer):
            mapped = RegionFlags.MMAP in region.info.flags
            good = len(region.fds) >= 1 if mapped else not region.fds
            wanted = f"{'a' if mapped else 'no'} descriptor for region {region.index}"
            expect(good, wanted, f"{len(region.fds)}, for {region.info.pretty()}")


@section.check(MUST)
async def no_more_descriptors_than_allowed(server: Server) -> None:
    """A client that takes no descriptors gets none."""
    async with server.session({**CAPABILITIES, "max_msg_fds": 0}) as peer:
        for region in await regions(peer):
            expect(not region.fds, f"no descriptor for region {region.index}", len(region.fds))


@section.check(MUST)
async def capability_chain(server: Server) -> None:
    """Capabilities lie within the reply, one behind the other, and end."""
    async with server.session() as peer:
        for region in await regions(peer):
            _areas(region)


@section.check(MUST)
async def sparse_areas(server: Server) -> None:
    """Sparse areas lie within their region, in whole pages."""
    async with server.session() as peer:
        found = False
        for region in await regions(peer):
            for capability in parse_capabilities_chain(region.info, region.chain):
                if isinstance(capability, SparseMmap):
                    found = True
                    for offset, length in _areas(region):
                        good = offset % PAGE == 0 and length % PAGE == 0
                        expect(good, f"whole pages of region {region.index}", f"{offset:#x}+{length:#x}")
        if not found:
            raise NotApplicable("no region can be mapped in part")


@section.check(MUST)
async def device_specific(server: Server) -> None:
    """A region beyond the nine of PCI carries a type capability."""
    async with server.session() as peer:
        extra = (await regions(peer))[RegionIndex.VGA + 1 :]
        if not extra:
            raise NotApplicable("the device has the regions of PCI alone")
        for region in extra:
            chain = parse_capabilities_chain(region.info, region.chain)
            kinds = [each.id for each in chain if isinstance(each, UnknownCapability)]
            expect(RegionCapability.TYPE in kinds, f"a type capability of region {region.index}", kinds)


@section.check(MUST)
async def mapping(server: Server) -> None:
    """What may be mapped can be: at the region's offset in the descriptor, and it shows what REGION_READ
    gives.
    """
    async with server.session() as peer:
        await decode_memory(peer)
        tried = False
        for region in await regions(peer):
            for offset, length in _areas(region):
                if length > LARGEST_MAPPING or not region.fds:
                    continue
                tried = True
                where = f"{offset:#x}+{length:#x} of region {region.index}"
                try:
                    view = mmap.mmap(
                        region.fds[0], length, prot=mmap.PROT_READ, offset=region.info.offset + offset
                    )
                except (OSError, ValueError) as error:
                    raise Failed(f"that {where} can be mapped", str(error)) from None
                with view:
                    by_message = await read(peer, region.index, offset, 64)
                    by_mapping = view[:64]
                expect(by_message == by_mapping, f"the same bytes by mapping, {where}", by_mapping.hex())
        if not tried:
            raise NotApplicable("no region can be mapped")


@section.check(MUST)
async def constant(server: Server) -> None:
    """What is said of a region does not change."""
    async with server.session() as peer:
        first, second = [[region.info for region in await regions(peer)] for _ in range(2)]
        expect(first == second, "the same regions twice", second)
