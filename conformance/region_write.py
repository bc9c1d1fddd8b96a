"""Checks of REGION_WRITE: what is written is a register without effect, or where nothing can be."""

from __future__ import annotations

from typing import Final

from conformance._device import (
    INTERRUPT_LINE,
    config,
    device_info,
    read,
    regions,
    scratch,
    scratch_read,
    scratch_write,
    write,
)
from conformance._messages import message, split
from conformance._server import Server
from conformance.checks import MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.limits import DEFAULT_MAX_DATA_XFER_SIZE
from protocol.messages import HeaderFlags, RegionAccess
from protocol.vfio import RegionIndex

section = Section("region-write", "VFIO_USER_REGION_WRITE")

CONFIG: Final = RegionIndex.CONFIG
TOP: Final = (1 << 64) - 1
HEADER_TYPE: Final = 0x0E
"""Of configuration space; read-only (PCI, "Header Type")."""


@section.check(MUST)
async def reply(server: Server) -> None:
    """The reply repeats the record, without data."""
    async with server.session() as peer, scratch(peer) as before:
        answer = await peer.granted(Command.REGION_WRITE, scratch_write(before))
        body, rest = split(answer, RegionAccess)
        good = body == scratch_read() and not rest
        expect(good, f"{scratch_read().pretty()} alone", f"{body.pretty()} and {len(rest)} bytes")


@section.check(MUST)
async def read_back(server: Server) -> None:
    """What was written to a register without effect is read back."""
    async with server.session() as peer, scratch(peer):
        for value in (b"\x00", b"\x5a", b"\xff"):
            await write(peer, CONFIG, INTERRUPT_LINE, value)
            got = await read(peer, CONFIG, INTERRUPT_LINE, 1)
            expect(got == value, f"the value written, {value!r}", repr(got))


@section.check(SHOULD)
async def read_only_register(server: Server) -> None:
    """Writing to a read-only register changes nothing, granted or refused."""
    async with server.session() as peer:
        await config(peer)
        before = await read(peer, CONFIG, HEADER_TYPE, 1)
        other = bytes([before[0] ^ 0xFF])
        await peer.ask(Command.REGION_WRITE, RegionAccess(HEADER_TYPE, CONFIG, 1).encode() + other)
        after = await read(peer, CONFIG, HEADER_TYPE, 1)
        expect(after == before, f"header type {before!r}", repr(after))


@section.check(MUST)
async def posted(server: Server) -> None:
    """A write that wants no reply gets none, also when it fails."""
    async with server.session() as peer, scratch(peer) as before:
        flags = HeaderFlags.NO_REPLY
        await peer.send(message(Command.REGION_WRITE, scratch_write(before), flags=flags))
        beyond = RegionAccess(1 << 40, CONFIG, 1).encode() + b"x"
        await peer.send(message(Command.REGION_WRITE, beyond, flags=flags))
        await peer.quiet("writes with No_reply")


@section.check(MUST)
async def outside(server: Server) -> None:
    """A write that leaves its region, wraps, or names none is refused."""
    async with server.session() as peer:
        size = (await config(peer)).length
        count = (await device_info(peer)).num_regions
        for offset, index in (
            (size, CONFIG),
            (size - 2, CONFIG),
            (TOP, CONFIG),
            (TOP - 3, CONFIG),
            (0, count),
        ):
            asked = RegionAccess(offset, index, 4)
            await peer.refused(Command.REGION_WRITE, asked.encode() + bytes(4), what=asked.pretty())


@section.check(MUST)
async def to_absent_region(server: Server) -> None:
    """A region without bytes cannot be written."""
    async with server.session() as peer:
        absent = [region.index for region in await regions(peer) if not region.length]
        if not absent:
            raise NotApplicable("every region has bytes")
        for index in absent:
            asked = RegionAccess(0, index, 4).encode() + bytes(4)
            await peer.refused(Command.REGION_WRITE, asked, what=f"empty region {index}")


@section.check(SHOULD)
async def data_too_short(server: Server) -> None:
    """A write with less data than it says is refused, and writes nothing."""
    async with server.session() as peer, scratch(peer) as before:
        for count, data in ((4, b"\x5a"), (1, b""), (0xFFFFFFFF, b"\x5a")):
            asked = RegionAccess(INTERRUPT_LINE, CONFIG, count).encode() + data
            await peer.refused(Command.REGION_WRITE, asked, what=f"{len(data)} bytes for {count}")
        got = await read(peer, CONFIG, INTERRUPT_LINE, 1)
        expect(got == before, f"the register unchanged, {before!r}", repr(got))


@section.check(SHOULD)
async def data_too_long(server: Server) -> None:
    """A write with more data than it says is refused, or only what it says is written; the stream stays in
    step.
    """
    async with server.session() as peer, scratch(peer):
        asked = RegionAccess(INTERRUPT_LINE, CONFIG, 1).encode() + bytes(8)
        await peer.ask(Command.REGION_WRITE, asked)
        await peer.quiet("what was answered")


@section.check(MUST)
async def of_too_much(server: Server) -> None:
    """A write of more than max_data_xfer_size is refused or ends the session: it is not done."""
    async with server.session() as peer:
        most = peer.limit("max_data_xfer_size", DEFAULT_MAX_DATA_XFER_SIZE)
        if most > DEFAULT_MAX_DATA_XFER_SIZE:
            raise NotApplicable(f"the server takes {most} bytes")
        beyond = RegionAccess(1 << 40, CONFIG, most + 1).encode() + bytes(most + 1)
        await peer.turned_down(message(Command.REGION_WRITE, beyond), what=f"{most + 1} bytes of {most}")
    await server.serves_on("a write of too much")
