"""Checks of many writes in one message."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from conformance._device import INTERRUPT_LINE, device_info, read, scratch
from conformance._messages import JSON, message, split
from conformance._peer import CAPABILITIES, Peer
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.limits import MAX_WRITES_PER_MESSAGE
from protocol.messages import HeaderFlags, WriteMulti, WriteMultiEntry
from protocol.vfio import RegionIndex

section = Section("write-multi", "VFIO_USER_REGION_WRITE_MULTI")

MULTI: Final[JSON] = {**CAPABILITIES, "write_multiple": True}
WRITE_MULTI: Final = Command.REGION_WRITE_MULTI
CONFIG: Final = RegionIndex.CONFIG


def _entry(value: int, *, offset: int = INTERRUPT_LINE, region: int = CONFIG, count: int = 1) -> bytes:
    return WriteMultiEntry(offset, region, count, bytes([value]).ljust(8, b"\xee")).encode()


def _body(entries: Sequence[bytes], count: int | None = None) -> bytes:
    return (len(entries) if count is None else count).to_bytes(8, sys.byteorder) + b"".join(entries)


@asynccontextmanager
async def _multiple(server: Server) -> AsyncIterator[Peer]:
    """A session where many writes in one message are agreed on, and the scratch register is there."""
    async with server.session(MULTI) as peer:
        if peer.announced.get("write_multiple") is not True:
            raise NotApplicable("the server does not say write_multiple")
        async with scratch(peer):
            yield peer


async def _register(peer: Peer) -> int:
    return (await read(peer, CONFIG, INTERRUPT_LINE, 1))[0]


@section.check(SHOULD)
async def not_negotiated(server: Server) -> None:
    """Without write_multiple the command is answered, and refused by a server that has none of it."""
    async with server.session(MULTI) as peer:
        if peer.announced.get("write_multiple") is True:
            raise NotApplicable("the server says write_multiple")
        await peer.refused(WRITE_MULTI, _body([]), what="not agreed on")


@section.check(MUST)
async def done(server: Server) -> None:
    """The writes are done, and the reply counts them."""
    async with _multiple(server) as peer:
        reply = await peer.granted(WRITE_MULTI, _body([_entry(0x5A)]))
        body, rest = split(reply, WriteMulti)
        expect(body.wr_cnt == 1 and not rest, "wr_cnt 1 alone", f"{body.pretty()} and {len(rest)} bytes")
        got = await _register(peer)
        expect(got == 0x5A, "the value written, 0x5a", hex(got))


@section.check(MUST)
async def in_order(server: Server) -> None:
    """The writes are done in their order."""
    async with _multiple(server) as peer:
        reply = await peer.granted(WRITE_MULTI, _body([_entry(value) for value in (1, 2, 3)]))
        expect(split(reply, WriteMulti)[0].wr_cnt == 3, "wr_cnt 3", reply.payload.hex())
        got = await _register(peer)
        expect(got == 3, "the last value, 0x3", hex(got))


@section.check(EXTENSION)
async def as_many_as_qemu_sends(server: Server) -> None:
    """As many writes as QEMU puts into a message (200) are done."""
    async with _multiple(server) as peer:
        writes = [_entry(value) for value in range(MAX_WRITES_PER_MESSAGE)]
        reply = await peer.granted(WRITE_MULTI, _body(writes))
        expect(
            split(reply, WriteMulti)[0].wr_cnt == len(writes), f"wr_cnt {len(writes)}", reply.payload.hex()
        )
        got = await _register(peer)
        expect(got == len(writes) - 1, f"the last value, {len(writes) - 1:#x}", hex(got))


@section.check(MUST)
async def posted(server: Server) -> None:
    """Writes that want no reply are done before later commands."""
    async with _multiple(server) as peer:
        await peer.send(message(WRITE_MULTI, _body([_entry(0x77)]), flags=HeaderFlags.NO_REPLY))
        got = await _register(peer)
        expect(got == 0x77, "the posted value, 0x77", hex(got))


@section.check(SHOULD)
async def bad_write(server: Server) -> None:
    """After a write that cannot be done, the message is refused or wr_cnt counts those before it."""
    async with _multiple(server) as peer:
        count = (await device_info(peer)).num_regions
        reply = await peer.ask(WRITE_MULTI, _body([_entry(4), _entry(5, region=count), _entry(6)]))
        if not reply.refused:
            done = split(reply, WriteMulti)[0].wr_cnt
            expect(done == 1, "wr_cnt 1, for the write before", done)
        await peer.quiet("what was answered")


@section.check(MUST)
async def too_wide(server: Server) -> None:
    """A write has at most 8 bytes: more are refused."""
    async with _multiple(server) as peer:
        for count in (9, 0xFFFFFFFF):
            reply = await peer.ask(WRITE_MULTI, _body([_entry(1, count=count)]))
            good = reply.refused or split(reply, WriteMulti)[0].wr_cnt == 0
            expect(good, f"a refusal of a write of {count} bytes, or wr_cnt 0", reply)


@section.check(SHOULD)
async def count_of_others(server: Server) -> None:
    """A message with fewer writes than it says is refused."""
    async with _multiple(server) as peer:
        for told in (2, 1 << 32, (1 << 64) - 1):
            await peer.refused(WRITE_MULTI, _body([_entry(1)], told), what=f"1 write of {told}")
        await peer.quiet("what was answered")


@section.check(EXTENSION)
async def of_nothing(server: Server) -> None:
    """A message without writes is answered, and the stream stays in step."""
    async with _multiple(server) as peer:
        await peer.ask(WRITE_MULTI, _body([]))
        await peer.quiet("what was answered")
