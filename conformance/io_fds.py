"""Checks of the descriptors by which parts of a region are reached without a message."""

from __future__ import annotations

from typing import Final

from conformance._device import ROOM, regions
from conformance._messages import Message, kind_of, split
from conformance._peer import Peer
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import IoEventFd, RegionIoFds
from protocol.vfio import IoFdType

section = Section("io-fds", "VFIO_USER_DEVICE_GET_REGION_IO_FDS")

COMMAND: Final = Command.DEVICE_GET_REGION_IO_FDS


async def _offered(peer: Peer) -> list[tuple[int, int, Message]]:
    """(index, size, reply) of the regions that have such descriptors."""
    found = []
    for region in await regions(peer):
        reply = await peer.ask(COMMAND, RegionIoFds(ROOM, index=region.index))
        if reply.refused:
            continue
        body, _ = split(reply, RegionIoFds)
        if body.argsz > ROOM:
            reply = await peer.granted(COMMAND, RegionIoFds(body.argsz, index=region.index))
        if split(reply, RegionIoFds)[0].count:
            found.append((region.index, region.length, reply))
    if not found:
        raise NotApplicable("no region has descriptors for I/O")
    return found


def _entries(reply: Message) -> list[IoEventFd]:
    """The sub-regions, whose size follows from argsz and count."""
    body, data = split(reply, RegionIoFds)
    size = (body.argsz - RegionIoFds.size) // body.count
    expect(size >= IoEventFd.size, "entries of at least 40 bytes", size)
    expect(len(data) == size * body.count, f"{body.count} entries of {size} bytes", f"{len(data)} bytes")
    return [IoEventFd.decode(data, number * size) for number in range(body.count)]


@section.check(MUST)
async def answered(server: Server) -> None:
    """The command is optional: each region's question is granted or refused."""
    async with server.session() as peer:
        for region in await regions(peer):
            await peer.ask(COMMAND, RegionIoFds(ROOM, index=region.index))
        await peer.quiet("what was answered")


@section.check(MUST)
async def reply(server: Server) -> None:
    """The reply repeats the index, has no flags, and its argsz counts the record and the entries."""
    async with server.session() as peer:
        for index, _, answer in await _offered(peer):
            body, _ = split(answer, RegionIoFds)
            good = (body.index, body.flags, body.argsz) == (index, 0, len(answer.payload))
            expect(good, f"index {index}, flags 0, argsz {len(answer.payload)}", body.pretty())
            _entries(answer)


@section.check(MUST)
async def descriptors(server: Server) -> None:
    """There is at least one descriptor, and each entry names one that is there."""
    async with server.session() as peer:
        for _, _, answer in await _offered(peer):
            expect(answer.fds, "at least one descriptor", answer)
            for entry in _entries(answer):
                expect(entry.fd_index < len(answer.fds), f"one of {len(answer.fds)}", entry.pretty())


@section.check(MUST)
async def types(server: Server) -> None:
    """A sub-region is reached by an ioeventfd or an ioregionfd; the first is an eventfd."""
    async with server.session() as peer:
        for _, _, answer in await _offered(peer):
            for entry in _entries(answer):
                expect(entry.type in tuple(IoFdType), "type 0 or 1", entry.pretty())
                if entry.type == IoFdType.IOEVENTFD and entry.fd_index < len(answer.fds):
                    kind = kind_of(answer.fds[entry.fd_index])
                    expect(kind == "anon_inode:[eventfd]", "an eventfd", kind)


@section.check(MUST)
async def within_the_region(server: Server) -> None:
    """Sub-regions lie within their region."""
    async with server.session() as peer:
        for _, size, answer in await _offered(peer):
            for entry in _entries(answer):
                good = entry.offset + max(entry.length, 1) <= size
                expect(good, f"a part of {size:#x} bytes", entry.pretty())


@section.check(MUST)
async def little_room(server: Server) -> None:
    """An answer longer than the request allows is cut, and argsz tells the need."""
    async with server.session() as peer:
        for index, _, answer in await _offered(peer):
            short = await peer.granted(COMMAND, RegionIoFds(RegionIoFds.size, index=index))
            body, rest = split(short, RegionIoFds)
            good = body.argsz == len(answer.payload) and not rest
            expect(good, f"16 bytes with argsz {len(answer.payload)}", f"{body.pretty()}, {len(rest)} more")


@section.check(SHOULD)
async def beyond(server: Server) -> None:
    """An index that is not there is refused."""
    async with server.session() as peer:
        for index in (len(await regions(peer)), 0xFFFFFFFF):
            await peer.refused(COMMAND, RegionIoFds(ROOM, index=index), what=f"region {index}")


@section.check(EXTENSION)
async def flags(server: Server) -> None:
    """Flags of a request are 0: others are refused."""
    async with server.session() as peer:
        for index, _, _ in await _offered(peer):
            await peer.refused(COMMAND, RegionIoFds(ROOM, flags=1, index=index), what="flags 1")


@section.check(EXTENSION)
async def small_argsz(server: Server) -> None:
    """An argsz below the size of the record is refused, as everywhere else."""
    async with server.session() as peer:
        await peer.refused(COMMAND, RegionIoFds(RegionIoFds.size - 1), what="argsz 15 of 16")
