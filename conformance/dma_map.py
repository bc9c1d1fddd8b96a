"""Checks of windows into the client's memory."""

from __future__ import annotations

import os
from dataclasses import replace
from errno import EEXIST
from typing import Final

from conformance._memory import IOVA, PAGE
from conformance._messages import message
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.limits import DEFAULT_MAX_DMA_MAPS, DEFAULT_PGSIZES
from protocol.messages import DmaMap, HeaderFlags
from protocol.vfio import DmaMapFlags

section = Section("dma-map", "VFIO_USER_DMA_MAP")

BOTH: Final = DmaMapFlags.READ | DmaMapFlags.WRITE
WINDOW: Final = DmaMap(DmaMap.size, BOTH, 0, IOVA, 4 * PAGE)
TOP: Final = (1 << 64) - PAGE
"""The last page that an IOVA may lie in."""

MANY: Final = 64
FEW_WINDOWS: Final = 4096
"""A limit up to which it is tried out."""


@section.check(MUST)
async def with_descriptor(server: Server) -> None:
    """Memory with a descriptor becomes a window; the reply has no payload."""
    async with server.session() as peer:
        reply = await peer.granted(Command.DMA_MAP, WINDOW, [peer.memory(4 * PAGE).fd])
        expect(not reply.payload, "a reply without payload", reply)


@section.check(MUST)
async def without_descriptor(server: Server) -> None:
    """Memory without a descriptor becomes a window as well, to be reached by messages."""
    async with server.session() as peer:
        reply = await peer.granted(Command.DMA_MAP, WINDOW)
        expect(not reply.payload, "a reply without payload", reply)


@section.check(MUST)
async def permissions(server: Server) -> None:
    """A window may be readable alone, or writable alone."""
    async with server.session() as peer:
        for flags in (DmaMapFlags.READ, DmaMapFlags.WRITE):
            reply = await peer.map(IOVA, peer.memory(PAGE), flags=flags)
            expect(not reply.refused, f"that a window with {flags!r} is granted", reply)
            await peer.unmapped(IOVA, PAGE)


@section.check(MUST)
async def offset(server: Server) -> None:
    """A window may begin anywhere in its file."""
    async with server.session() as peer:
        reply = await peer.map(IOVA, peer.memory(8 * PAGE), offset=3 * PAGE, length=2 * PAGE)
        expect(not reply.refused, "that a window at an offset is granted", reply)


@section.check(MUST)
async def overlap(server: Server) -> None:
    """A window over one that is there already is refused with EEXIST."""
    async with server.session() as peer:
        await peer.granted(Command.DMA_MAP, WINDOW, [peer.memory(4 * PAGE).fd])
        memory = peer.memory(8 * PAGE)
        for pages, length in ((0, 4), (1, 1), (-1, 2), (3, 2), (-1, 6)):
            over = replace(WINDOW, address=IOVA + pages * PAGE, length=length * PAGE)
            what = f"{over.length:#x} bytes at {over.address:#x}, over 0x4000 at {IOVA:#x}"
            await peer.refused(Command.DMA_MAP, over, [memory.fd], what=what, errno=EEXIST)


@section.check(MUST)
async def overlap_without_descriptor(server: Server) -> None:
    """Windows without descriptors must not overlap, either."""
    async with server.session() as peer:
        await peer.granted(Command.DMA_MAP, WINDOW)
        await peer.refused(Command.DMA_MAP, WINDOW, what="a window that is there", errno=EEXIST)


@section.check(MUST)
async def adjacent(server: Server) -> None:
    """A window may touch others on both sides."""
    async with server.session() as peer:
        for page in (1, 0, 2):
            await peer.mapped(IOVA + page * PAGE, peer.memory(PAGE), what=f"page {page} beside others")


@section.check(MUST)
async def again(server: Server) -> None:
    """An address that was unmapped can be mapped again."""
    async with server.session() as peer:
        memory = peer.memory(PAGE)
        for _ in range(3):
            await peer.mapped(IOVA, memory)
            await peer.unmapped(IOVA, PAGE)


@section.check(MUST)
async def same_file(server: Server) -> None:
    """One file may be behind several windows."""
    async with server.session() as peer:
        memory = peer.memory(2 * PAGE)
        for number in range(4):
            await peer.mapped(IOVA + number * memory.length, memory, what="one file again")


@section.check(MUST)
async def many(server: Server) -> None:
    """As many windows as the server says it bears, or 64, may be there at a time."""
    async with server.session() as peer:
        memory = peer.memory(PAGE)
        count = min(MANY, peer.limit("max_dma_maps", DEFAULT_MAX_DMA_MAPS))
        for number in range(count):
            await peer.mapped(IOVA + 2 * number * PAGE, memory, what=f"window {number + 1} of {count}")
        for number in range(count):
            await peer.unmapped(IOVA + 2 * number * PAGE, PAGE)


@section.check(SHOULD)
async def one_too_many(server: Server) -> None:
    """More windows than the server says it bears are refused."""
    async with server.session() as peer:
        most = peer.limit("max_dma_maps", DEFAULT_MAX_DMA_MAPS)
        if most > FEW_WINDOWS:
            raise NotApplicable(f"{most} windows would take too long")
        for number in range(most):
            await peer.mapped(IOVA + number * PAGE, peer.memory(PAGE), shared=False)
        beyond = replace(WINDOW, address=IOVA + most * PAGE, length=PAGE)
        await peer.refused(Command.DMA_MAP, beyond, what=f"window {most + 1} of {most}")


@section.check(SHOULD)
async def wraps(server: Server) -> None:
    """A window that ends beyond the address space is refused."""
    async with server.session() as peer:
        over = replace(WINDOW, address=TOP, length=2 * PAGE)
        await peer.refused(Command.DMA_MAP, over, what="a window that wraps")
        await peer.refused(Command.DMA_MAP, over, [peer.memory(2 * PAGE).fd], what="a window that wraps")


@section.check(SHOULD)
async def offset_wraps(server: Server) -> None:
    """A window that ends beyond all files is refused."""
    async with server.session() as peer:
        over = replace(WINDOW, offset=TOP)
        await peer.refused(Command.DMA_MAP, over, [peer.memory(PAGE).fd], what="an offset that wraps")


@section.check(EXTENSION)
async def empty(server: Server) -> None:
    """A window of no bytes is refused, as the kernel does."""
    async with server.session() as peer:
        await peer.refused(Command.DMA_MAP, replace(WINDOW, length=0), what="an empty window")


@section.check(SHOULD)
async def unaligned(server: Server) -> None:
    """A window that is no multiple of a page size that the server takes is refused."""
    async with server.session() as peer:
        page = peer.limit("pgsizes", DEFAULT_PGSIZES) or DEFAULT_PGSIZES
        smallest = page & -page
        if smallest == 1:
            raise NotApplicable("the server takes pages of any size")
        memory = peer.memory(4 * PAGE)
        for address, length in ((IOVA + smallest // 2, PAGE), (IOVA, PAGE + smallest // 2)):
            odd = replace(WINDOW, address=address, length=length)
            await peer.refused(Command.DMA_MAP, odd, [memory.fd], what=f"{length:#x} at {address:#x}")


@section.check(EXTENSION)
async def no_permission(server: Server) -> None:
    """A window that can be neither read nor written is refused, as the kernel does."""
    async with server.session() as peer:
        await peer.refused(Command.DMA_MAP, replace(WINDOW, flags=DmaMapFlags(0)), what="no permission")


@section.check(EXTENSION)
async def undefined_flags(server: Server) -> None:
    """Flags that are not defined are refused: to ignore them would map something else than was meant."""
    async with server.session() as peer:
        odd = replace(WINDOW, flags=DmaMapFlags(BOTH | 1 << 16))
        await peer.refused(Command.DMA_MAP, odd, [peer.memory(4 * PAGE).fd], what="flags 0x10003")


@section.check(EXTENSION)
async def small_argsz(server: Server) -> None:
    """An argsz below the size of the record is refused, as the kernel does."""
    async with server.session() as peer:
        await peer.refused(Command.DMA_MAP, replace(WINDOW, argsz=31), what="argsz 31 of 32")


@section.check(EXTENSION)
async def two_descriptors(server: Server) -> None:
    """A window has one descriptor or none: two are refused."""
    async with server.session() as peer:
        fds = [peer.memory(4 * PAGE).fd, peer.memory(4 * PAGE).fd]
        await peer.refused(Command.DMA_MAP, WINDOW, fds, what="two descriptors")


@section.check(SHOULD)
async def no_memory(server: Server) -> None:
    """A descriptor that cannot be mapped makes no window."""
    async with server.session() as peer:
        await peer.refused(Command.DMA_MAP, WINDOW, [peer.eventfd()], what="an eventfd as memory")


@section.check(EXTENSION)
async def file_too_short(server: Server) -> None:
    """A file that ends within the window is refused, or at least does not end the server."""
    async with server.session() as peer:
        await peer.ask(Command.DMA_MAP, WINDOW, [peer.memory(PAGE).fd])
        await peer.quiet("what was answered")


@section.check(EXTENSION)
async def read_only_file(server: Server) -> None:
    """A file opened for reading makes no window that can be written."""
    async with server.session() as peer:
        fd = os.open(f"/proc/self/fd/{peer.memory(4 * PAGE).fd}", os.O_RDONLY | os.O_CLOEXEC)
        peer.own(fd)
        await peer.refused(Command.DMA_MAP, WINDOW, [fd], what="a writable window over a read-only file")


@section.check(SHOULD)
async def refused_is_released(server: Server) -> None:
    """Memory whose window was refused is not left mapped."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(4 * PAGE))
        memory = peer.memory(4 * PAGE)
        await peer.refused(Command.DMA_MAP, WINDOW, [memory.fd], what="a window that is there")
        expect(memory.seal(), "that the refused window's memory is not mapped", "a mapping")


@section.check(MUST)
async def refused_changes_nothing(server: Server) -> None:
    """A refused window leaves those that are there alone."""
    async with server.session() as peer:
        await peer.mapped(IOVA, peer.memory(4 * PAGE))
        inside = replace(WINDOW, address=IOVA + PAGE, length=PAGE)
        await peer.refused(Command.DMA_MAP, inside, [peer.memory(PAGE).fd], what="a window inside another")
        await peer.unmapped(IOVA, 4 * PAGE, what="the window that was there")


@section.check(MUST)
async def posted(server: Server) -> None:
    """A window that wants no reply is there for the commands that follow."""
    async with server.session() as peer:
        asked = message(Command.DMA_MAP, WINDOW.encode(), flags=HeaderFlags.NO_REPLY)
        await peer.send(asked, [peer.memory(4 * PAGE).fd])
        await peer.refused(Command.DMA_MAP, WINDOW, what="a window that is there", errno=EEXIST)
        await peer.unmapped(IOVA, 4 * PAGE)


@section.check(EXTENSION)
async def without_descriptors_at_all(server: Server) -> None:
    """A client that takes no descriptors may use the device by messages alone."""
    async with server.session({"max_msg_fds": 0, "max_data_xfer_size": 1 << 20}) as peer:
        await peer.granted(Command.DMA_MAP, WINDOW)
        await peer.unmapped(IOVA, 4 * PAGE)
