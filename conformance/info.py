"""Checks of what the device and its interrupts are said to be."""

from __future__ import annotations

from typing import Final

from conformance._device import MOST_INDEXES, config, device_info, irqs, read
from conformance._messages import split
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import DeviceInfo, IrqInfo
from protocol.vfio import DeviceFlags, IrqIndex, IrqInfoFlags, RegionIndex

device = Section("device-info", "VFIO_USER_DEVICE_GET_INFO")
irq = Section("irq-info", "VFIO_USER_DEVICE_GET_IRQ_INFO")

INTERRUPT_PIN: Final = 0x3D
"""Which INTx pin a function uses, 0 for none (PCI, "Interrupt Pin")."""
STATUS: Final = 0x06
CAPABILITY_LIST: Final = 1 << 4
FIRST_CAPABILITY: Final = 0x34
MSIX_CAPABILITY: Final = 0x11
LONGEST_CHAIN: Final = 48
"""Capabilities that fit into the 192 bytes behind the header: a longer chain is a circle."""


@device.check(MUST)
async def reply(server: Server) -> None:
    """The reply is the record alone, and argsz its size."""
    async with server.session() as peer:
        answer = await peer.granted(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size))
        body, rest = split(answer, DeviceInfo)
        expect(body.argsz == DeviceInfo.size and not rest, "16 bytes with argsz 16", answer)


@device.check(MUST)
async def pci(server: Server) -> None:
    """The device is a PCI device: there is no other kind."""
    async with server.session() as peer:
        flags = (await device_info(peer)).flags
        expect(DeviceFlags.PCI in flags, "VFIO_DEVICE_FLAGS_PCI", repr(flags))


@device.check(SHOULD)
async def defined_flags(server: Server) -> None:
    """No flags are set that are not defined."""
    async with server.session() as peer:
        flags = int((await device_info(peer)).flags)
        expect(flags & ~0x3 == 0, "bits 0 and 1 alone", hex(flags))


@device.check(MUST)
async def regions(server: Server) -> None:
    """A PCI device has its nine regions at least."""
    async with server.session() as peer:
        count = (await device_info(peer)).num_regions
        expect(count > RegionIndex.VGA, "at least 9 regions", count)


@device.check(EXTENSION)
async def interrupts(server: Server) -> None:
    """A PCI device has the five kinds of interrupts that the kernel's VFIO has."""
    async with server.session() as peer:
        count = (await device_info(peer)).num_irqs
        expect(count > IrqIndex.REQ, "at least 5 kinds of interrupts", count)


@device.check(MUST)
async def large_argsz(server: Server) -> None:
    """An argsz that allows more than is needed is granted, and the reply's tells the need."""
    async with server.session() as peer:
        body, _ = split(await peer.granted(Command.DEVICE_GET_INFO, DeviceInfo(4096)), DeviceInfo)
        expect(body.argsz == DeviceInfo.size, "argsz 16", body.argsz)


@device.check(EXTENSION)
async def small_argsz(server: Server) -> None:
    """An argsz below the size of the record is refused, as the kernel does."""
    async with server.session() as peer:
        for argsz in (0, DeviceInfo.size - 1):
            await peer.refused(Command.DEVICE_GET_INFO, DeviceInfo(argsz), what=f"argsz {argsz} of 16")


@device.check(MUST)
async def constant(server: Server) -> None:
    """What is said of the device does not change."""
    async with server.session() as peer:
        told = [await device_info(peer) for _ in range(2)]
        expect(told[0] == told[1], told[0].pretty(), told[1].pretty())


@irq.check(MUST)
async def every_index(server: Server) -> None:
    """Each kind of interrupt is described: its index again, argsz 16, and no more."""
    async with server.session() as peer:
        for index in range(min((await device_info(peer)).num_irqs, MOST_INDEXES)):
            answer = await peer.granted(Command.DEVICE_GET_IRQ_INFO, IrqInfo(IrqInfo.size, index=index))
            body, rest = split(answer, IrqInfo)
            good = (body.argsz, body.index, rest) == (IrqInfo.size, index, b"")
            expect(good, f"argsz 16 and index {index}", f"{body.pretty()} and {len(rest)} bytes")


@irq.check(MUST)
async def beyond(server: Server) -> None:
    """An index that is not there is refused."""
    async with server.session() as peer:
        count = (await device_info(peer)).num_irqs
        for index in (count, count + 1, 0xFFFFFFFF):
            asked = IrqInfo(IrqInfo.size, index=index)
            await peer.refused(Command.DEVICE_GET_IRQ_INFO, asked, what=f"index {index} of {count}")


@irq.check(EXTENSION)
async def too_small_argsz(server: Server) -> None:
    """An argsz below the size of the record is refused, as the kernel does."""
    async with server.session() as peer:
        asked = IrqInfo(IrqInfo.size - 1)
        await peer.refused(Command.DEVICE_GET_IRQ_INFO, asked, what="argsz 15 of 16")


@irq.check(MUST)
async def room_to_spare(server: Server) -> None:
    """An argsz that allows more than is needed is granted."""
    async with server.session() as peer:
        if not await irqs(peer):
            raise NotApplicable("the device has no interrupts")
        body, _ = split(await peer.granted(Command.DEVICE_GET_IRQ_INFO, IrqInfo(4096)), IrqInfo)
        expect(body.argsz == IrqInfo.size, "argsz 16", body.argsz)


@irq.check(SHOULD)
async def flags(server: Server) -> None:
    """No flags are set that are not defined."""
    async with server.session() as peer:
        for body in await irqs(peer):
            expect(int(body.flags) & ~0xF == 0, f"bits 0 to 3 alone, for index {body.index}", body.pretty())


@irq.check(EXTENSION)
async def automasked_can_be_masked(server: Server) -> None:
    """What masks itself can be unmasked: AUTOMASKED comes with MASKABLE, as the kernel has it."""
    async with server.session() as peer:
        for body in await irqs(peer):
            if IrqInfoFlags.AUTOMASKED in body.flags:
                expect(IrqInfoFlags.MASKABLE in body.flags, "AUTOMASKED with MASKABLE", body.pretty())


@irq.check(EXTENSION)
async def level_interrupts_mask_themselves(server: Server) -> None:
    """INTx is a level, and so AUTOMASKED: without that it would fire for ever."""
    async with server.session() as peer:
        found = await irqs(peer)
        if not found or not found[IrqIndex.INTX].count:
            raise NotApplicable("the device has no INTx")
        expect(IrqInfoFlags.AUTOMASKED in found[IrqIndex.INTX].flags, "AUTOMASKED", found[0].pretty())


@irq.check(SHOULD)
async def pin(server: Server) -> None:
    """There is one INTx where configuration space names an interrupt pin, and else none."""
    async with server.session() as peer:
        found = await irqs(peer)
        await config(peer)
        pin = (await read(peer, RegionIndex.CONFIG, INTERRUPT_PIN, 1))[0]
        count = found[IrqIndex.INTX].count if found else 0
        expect(count == (1 if pin else 0), f"{1 if pin else 0} INTx, for interrupt pin {pin}", count)


@irq.check(SHOULD)
async def msix_vectors(server: Server) -> None:
    """There are as many MSI-X interrupts as configuration space says (Table Size)."""
    async with server.session() as peer:
        await config(peer)
        space = await read(peer, RegionIndex.CONFIG, 0, 256)
        position = _capability(space, MSIX_CAPABILITY)
        if position is None:
            raise NotApplicable("the device has no MSI-X capability")
        size = (int.from_bytes(space[position + 2 : position + 4], "little") & 0x7FF) + 1
        found = await irqs(peer)
        count = found[IrqIndex.MSIX].count if len(found) > IrqIndex.MSIX else 0
        expect(count == size, f"{size} interrupts of index 2", count)


def _capability(space: bytes, wanted: int) -> int | None:
    """Where a PCI capability begins in the first 256 bytes of configuration space."""
    if not space[STATUS] & CAPABILITY_LIST:
        return None
    at = space[FIRST_CAPABILITY] & 0xFC
    for _ in range(LONGEST_CHAIN):
        if at < 0x40 or at + 4 > len(space):
            return None
        if space[at] == wanted:
            return at
        at = space[at + 1] & 0xFC
    return None
