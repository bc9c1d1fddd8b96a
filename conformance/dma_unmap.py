"""Checks of windows that are taken back."""

from __future__ import annotations

from typing import Final

from conformance._features import put
from conformance._memory import IOVA, PAGE
from conformance._messages import message, split
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import Bitmap, DmaLoggingControl, DmaUnmap, HeaderFlags
from protocol.vfio import DmaUnmapFlags, Feature

section = Section("dma-unmap", "VFIO_USER_DMA_UNMAP")

NONE: Final = DmaUnmapFlags(0)
WINDOW: Final = DmaUnmap(DmaUnmap.size, NONE, IOVA, 4 * PAGE)


@section.check(MUST)
async def entry_is_repeated(server: Server) -> None:
    """The reply is the entry of the request again."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(4 * PAGE))
        reply = await peer.unmapped(IOVA, 4 * PAGE)
        body, rest = split(reply, DmaUnmap)
        same = (body.flags, body.address, body.length) == (NONE, IOVA, 4 * PAGE)
        expect(same and not rest, f"{WINDOW.pretty()} alone", f"{body.pretty()} and {len(rest)} bytes")


@section.check(MUST)
async def memory_is_released(server: Server) -> None:
    """The reply comes when nothing refers to the window's memory any more."""
    async with server.session() as peer:
        memory = peer.memory(4 * PAGE)
        await peer.mapped(IOVA, memory)
        await peer.unmapped(IOVA, 4 * PAGE)
        expect(memory.seal(), "memory that the server does not map, once the reply is there", "a mapping")


@section.check(MUST)
async def without_descriptor(server: Server) -> None:
    """A window without a descriptor is taken back like any other."""
    async with server.session() as peer:
        for _ in range(2):
            await peer.mapped(IOVA, peer.memory(PAGE), shared=False)
            await peer.unmapped(IOVA, PAGE)


@section.check(MUST)
async def others_stay(server: Server) -> None:
    """Only the window that was named is taken back."""
    async with server.session() as peer:
        for page in range(3):
            await peer.mapped(IOVA + page * PAGE, peer.memory(PAGE))
        await peer.unmapped(IOVA + PAGE, PAGE)
        for page in (0, 2):
            await peer.unmapped(IOVA + page * PAGE, PAGE, what="a neighbour of one that was unmapped")


@section.check(MUST)
async def part_of_a_window(server: Server) -> None:
    """Address and size are exactly those of a window: a part of one is refused, and the window stays."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(4 * PAGE))
        for page, pages in ((0, 1), (1, 2), (3, 1), (2, 4)):
            reply = await peer.unmap(IOVA + page * PAGE, pages * PAGE)
            expect(reply.refused, f"a refusal for pages {page} to {page + pages} of 4", reply)
        await peer.unmapped(IOVA, 4 * PAGE, what="the window as a whole")


@section.check(SHOULD)
async def unknown(server: Server) -> None:
    """A window that never was is answered, either way, and harms none that is."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(PAGE))
        await peer.unmap(5 * IOVA, PAGE)
        await peer.unmapped(IOVA, PAGE)


@section.check(SHOULD)
async def wraps(server: Server) -> None:
    """A window that ends beyond the address space is refused."""
    async with server.session() as peer:
        reply = await peer.unmap((1 << 64) - PAGE, 2 * PAGE)
        expect(reply.refused, "a refusal of a window that wraps", reply)


@section.check(EXTENSION)
async def small_argsz(server: Server) -> None:
    """An argsz below the size of the record is refused, as the kernel does."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(4 * PAGE))
        small = DmaUnmap(DmaUnmap.size - 1, NONE, IOVA, 4 * PAGE)
        await peer.refused(Command.DMA_UNMAP, small, what="argsz 23 of 24")


@section.check(EXTENSION)
async def everything(server: Server) -> None:
    """The flag for all windows, which QEMU sends with address and size 0, takes all of them back."""
    async with server.session() as peer:
        memories = [peer.memory(PAGE) for _ in range(3)]
        for number, memory in enumerate(memories):
            await peer.mapped(IOVA + 2 * number * PAGE, memory)
        reply = await peer.unmap(0, 0, DmaUnmapFlags.ALL)
        expect(not reply.refused, "that DMA_UNMAP of everything is granted", reply)
        for memory in memories:
            expect(memory.seal(), "that no window is mapped", "a mapping")


@section.check(EXTENSION)
async def everything_at_an_address(server: Server) -> None:
    """The flag for all windows together with an address or a size is refused, as the kernel does."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(PAGE))
        reply = await peer.unmap(IOVA, PAGE, DmaUnmapFlags.ALL)
        expect(reply.refused, "a refusal of everything at an address", reply)


@section.check(EXTENSION)
async def dirty_bitmap(server: Server) -> None:
    """A dirty bitmap, of earlier versions, is refused or follows the entry with a bit for each page."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(4 * PAGE))
        await put(peer, Feature.DMA_LOGGING_START, DmaLoggingControl(PAGE, 0))
        bits = Bitmap(PAGE, 8)
        room = DmaUnmap.size + Bitmap.size + bits.length
        asked = DmaUnmap(room, DmaUnmapFlags.GET_DIRTY_BITMAP, IOVA, 4 * PAGE)
        reply = await peer.ask(Command.DMA_UNMAP, asked.encode() + bits.encode())
        if reply.refused:
            raise NotApplicable("the server keeps no dirty bitmap at DMA_UNMAP")
        expect(len(reply.payload) == room, f"{room} bytes of entry, bitmap record and bits", reply)


@section.check(MUST)
async def posted(server: Server) -> None:
    """A window that is taken back without a reply is gone for the commands that follow."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(4 * PAGE))
        await peer.send(message(Command.DMA_UNMAP, WINDOW.encode(), flags=HeaderFlags.NO_REPLY))
        await peer.mapped(IOVA, peer.memory(PAGE), what="where a window was taken back")
