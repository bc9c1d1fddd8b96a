"""Checks of what the kernel's vfio-pci grants to INTx, MSI, MSI-X, ERR and REQ, each by itself and together.

The text leaves most of it open. Clients were written for the kernel, and rely on it.
"""

from __future__ import annotations

import os
from typing import Final

import trio

from conformance._device import irqs
from conformance._peer import Peer
from conformance._server import Server
from conformance.checks import EXTENSION, NotApplicable, Section, expect
from conformance.set_irqs import (
    BOOL,
    EVENTFD,
    MASK,
    NONE,
    SET_IRQS,
    TRIGGER,
    UNMASK,
    body,
    fire,
    heard,
    silent,
    wire,
)
from protocol.messages import IrqInfo
from protocol.vfio import IrqIndex, IrqInfoFlags

FULL: Final = 2**64 - 2
"""The largest counter of an eventfd (eventfd(2)): nothing can be written until it was read."""

section = Section("irq-kinds", "VFIO_USER_DEVICE_SET_IRQS, kind by kind")


async def _kinds(peer: Peer, *indexes: IrqIndex) -> list[IrqInfo]:
    """Those of the indexes that have interrupts and take eventfds."""
    found = await irqs(peer)
    return [
        found[index]
        for index in indexes
        if index < len(found) and found[index].count and IrqInfoFlags.EVENTFD in found[index].flags
    ]


async def _intx(peer: Peer) -> IrqInfo:
    found = await _kinds(peer, IrqIndex.INTX)
    if not found:
        raise NotApplicable("the device has no INTx that takes an eventfd")
    return found[0]


@section.check(EXTENSION)
async def one_at_a_time(server: Server) -> None:
    """While one of INTx, MSI and MSI-X is wired, wiring another is refused; afterwards it is granted."""
    async with server.session() as peer:
        kinds = await _kinds(peer, IrqIndex.INTX, IrqIndex.MSI, IrqIndex.MSIX)
        if len(kinds) < 2:
            raise NotApplicable("the device has one kind of interrupt")
        for irq in kinds:
            fds = await wire(peer, irq)
            for other in kinds:
                if other is not irq:
                    wiring = body(EVENTFD | TRIGGER, other)
                    what = f"index {other.index} while {irq.index} is wired"
                    await peer.refused(SET_IRQS, wiring, [peer.eventfd()], what=what)
            await fire(peer, irq)
            await heard(peer, fds[0], f"index {irq.index}, which was wired before")
            await peer.granted(SET_IRQS, body(NONE | TRIGGER, irq, 0, 0), what="count 0")


@section.check(EXTENSION)
async def beside_errors(server: Server) -> None:
    """ERR and REQ are wired beside any other kind."""
    async with server.session() as peer:
        kinds = await _kinds(peer, IrqIndex.INTX, IrqIndex.MSI, IrqIndex.MSIX)
        own = await _kinds(peer, IrqIndex.ERR, IrqIndex.REQ)
        if not kinds or not own:
            raise NotApplicable("the device has no error or release interrupt, or no other")
        for irq in kinds:
            fds = [(await wire(peer, each))[0] for each in (irq, *own)]
            for fd, each in zip(fds, (irq, *own), strict=True):
                await fire(peer, each)
                await heard(peer, fd, f"index {each.index} beside {irq.index}")
                await silent(peer, fds, f"of another index than {each.index}")
            for each in (irq, *own):
                await peer.granted(SET_IRQS, body(NONE | TRIGGER, each, 0, 0), what="count 0")


@section.check(EXTENSION)
async def not_maskable(server: Server) -> None:
    """What does not say MASKABLE refuses MASK and UNMASK."""
    async with server.session() as peer:
        found = [irq for irq in await irqs(peer) if irq.count and IrqInfoFlags.MASKABLE not in irq.flags]
        if not found:
            raise NotApplicable("every kind of interrupt is maskable")
        for irq in found:
            if IrqInfoFlags.EVENTFD in irq.flags:
                await wire(peer, irq)
            for action in (MASK, UNMASK):
                await peer.refused(SET_IRQS, body(NONE | action, irq), what=f"{action!r} of {irq.index}")
            await peer.granted(SET_IRQS, body(NONE | TRIGGER, irq, 0, 0), what="count 0")


@section.check(EXTENSION)
async def mask_by_descriptor(server: Server) -> None:
    """No eventfd masks INTx: MASK with DATA_EVENTFD is refused."""
    async with server.session() as peer:
        irq = await _intx(peer)
        await wire(peer, irq)
        await peer.refused(SET_IRQS, body(EVENTFD | MASK, irq), [peer.eventfd()], what="to mask INTx")


@section.check(EXTENSION)
async def intx_unwired(server: Server) -> None:
    """While INTx is not wired nothing can be asked of it: TRIGGER as a test, MASK and UNMASK are refused."""
    async with server.session() as peer:
        irq = await _intx(peer)
        for action in (TRIGGER, MASK, UNMASK):
            await peer.refused(SET_IRQS, body(NONE | action, irq), what=f"{action!r}, nothing is wired")
            boolean = body(BOOL | action, irq, 0, 1, b"\1")
            await peer.refused(SET_IRQS, boolean, what=f"{action!r} with a boolean, nothing is wired")
        unmasking = body(EVENTFD | UNMASK, irq)
        await peer.refused(SET_IRQS, unmasking, [peer.eventfd()], what="an eventfd that unmasks nothing")


@section.check(EXTENSION)
async def unmask_descriptor_of_others(server: Server) -> None:
    """No eventfd unmasks another kind than INTx."""
    async with server.session() as peer:
        kinds = await _kinds(peer, IrqIndex.MSI, IrqIndex.MSIX, IrqIndex.ERR, IrqIndex.REQ)
        if not kinds:
            raise NotApplicable("the device has no other kind than INTx")
        for irq in kinds:
            await wire(peer, irq)
            unmasking = body(EVENTFD | UNMASK, irq)
            await peer.refused(SET_IRQS, unmasking, [peer.eventfd()], what=f"for index {irq.index}")
            await peer.granted(SET_IRQS, body(NONE | TRIGGER, irq, 0, 0), what="count 0")


@section.check(EXTENSION)
async def trigger_passes_the_mask(server: Server) -> None:
    """TRIGGER as a test of INTx reaches the eventfd while the line is masked."""
    async with server.session() as peer:
        irq = await _intx(peer)
        if IrqInfoFlags.MASKABLE not in irq.flags:
            raise NotApplicable("INTx is not maskable")
        fds = await wire(peer, irq)
        await peer.granted(SET_IRQS, body(NONE | MASK, irq), what="to mask INTx")
        await silent(peer, fds, "of a line that nothing was asked of")
        await fire(peer, irq)
        await heard(peer, fds[0], "INTx, which is masked")


@section.check(EXTENSION)
async def unmask_descriptor_is_read(server: Server) -> None:
    """An eventfd that unmasks INTx is emptied when it is signalled, and a line that is low stays silent."""
    async with server.session() as peer:
        irq = await _intx(peer)
        fds = await wire(peer, irq)
        unmask = peer.eventfd()
        if (await peer.ask(SET_IRQS, body(EVENTFD | UNMASK, irq), [unmask])).refused:
            raise NotApplicable("no eventfd unmasks INTx")
        await peer.granted(SET_IRQS, body(NONE | MASK, irq), what="to mask INTx")
        os.eventfd_write(unmask, FULL)
        with trio.move_on_after(peer.patience) as late:
            await trio.lowlevel.wait_writable(unmask)
        expect(not late.cancelled_caught, "that the server reads it", f"not within {peer.patience:g} s")
        await silent(peer, fds, "of a line that is low")
