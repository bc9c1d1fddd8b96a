"""Checks of DEVICE_RESET: only a device that announces it is reset."""

from __future__ import annotations

from conformance._device import BUS_MASTER, COMMAND, config, read, regions, resettable, write
from conformance._memory import IOVA, PAGE
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.vfio import RegionIndex

section = Section("reset", "VFIO_USER_DEVICE_RESET")


@section.check(MUST)
async def empty_reply(server: Server) -> None:
    """A device that announces it can be reset; the reply has no payload."""
    async with server.session() as peer:
        await resettable(peer)
        answer = await peer.granted(Command.DEVICE_RESET)
        expect(not answer.payload, "a header alone", answer)


@section.check(MUST)
async def session_goes_on(server: Server) -> None:
    """The session goes on after a reset, with the device as it was described."""
    async with server.session() as peer:
        await resettable(peer)
        before = [region.info for region in await regions(peer)]
        await peer.granted(Command.DEVICE_RESET)
        after = [region.info for region in await regions(peer)]
        expect(before == after, "the same regions before and after", after)


@section.check(SHOULD)
async def stops_dma(server: Server) -> None:
    """A reset puts registers back: bus mastering is off afterwards (PCI, "Command Register")."""
    async with server.session() as peer:
        await resettable(peer)
        await config(peer)
        command = int.from_bytes(await read(peer, RegionIndex.CONFIG, COMMAND, 2), "little")
        await write(peer, RegionIndex.CONFIG, COMMAND, (command | BUS_MASTER).to_bytes(2, "little"))
        if not (await read(peer, RegionIndex.CONFIG, COMMAND, 1))[0] & BUS_MASTER:
            raise NotApplicable("bus mastering cannot be switched on")
        await peer.granted(Command.DEVICE_RESET)
        after = (await read(peer, RegionIndex.CONFIG, COMMAND, 1))[0]
        expect(not after & BUS_MASTER, "the bus master bit cleared", f"a command register of {after:#x}")


@section.check(EXTENSION)
async def windows_stay(server: Server) -> None:
    """A reset leaves the client's windows, as the kernel does: they are not the device's."""
    async with server.session() as peer:
        await resettable(peer)
        await peer.mapped(IOVA, peer.memory(PAGE))
        await peer.granted(Command.DEVICE_RESET)
        await peer.unmapped(IOVA, PAGE, what="a window from before the reset")


@section.check(SHOULD)
async def not_announced(server: Server) -> None:
    """A device that does not announce it refuses a reset."""
    async with server.session() as peer:
        try:
            await resettable(peer)
        except NotApplicable:
            await peer.refused(Command.DEVICE_RESET, what="not announced")
        else:
            raise NotApplicable("the device announces DEVICE_RESET")


@section.check(EXTENSION)
async def with_payload(server: Server) -> None:
    """A reset has no payload: one that has is answered, and the stream stays in step."""
    async with server.session() as peer:
        await resettable(peer)
        await peer.ask(Command.DEVICE_RESET, bytes(8))
        await peer.quiet("what was answered")
