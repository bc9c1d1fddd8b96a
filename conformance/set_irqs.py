"""Checks of how interrupts are wired, fired, masked and taken away."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import trio

from conformance._device import irqs, resettable, vectors
from conformance._messages import Message, message
from conformance._peer import Peer
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, Failed, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import HeaderFlags, IrqInfo, SetIrqs
from protocol.vfio import IrqIndex, IrqInfoFlags, IrqSetFlags

section = Section("set-irqs", "VFIO_USER_DEVICE_SET_IRQS")

NONE: Final = IrqSetFlags.DATA_NONE
BOOL: Final = IrqSetFlags.DATA_BOOL
EVENTFD: Final = IrqSetFlags.DATA_EVENTFD
MASK: Final = IrqSetFlags.ACTION_MASK
UNMASK: Final = IrqSetFlags.ACTION_UNMASK
TRIGGER: Final = IrqSetFlags.ACTION_TRIGGER
SET_IRQS: Final = Command.DEVICE_SET_IRQS


def body(flags: int, irq: IrqInfo | int, start: int = 0, count: int = 1, data: bytes = b"") -> bytes:
    """The payload of a SET_IRQS."""
    index = irq if isinstance(irq, int) else irq.index
    return SetIrqs(SetIrqs.size + len(data), IrqSetFlags(flags), index, start, count).encode() + data


async def wire(peer: Peer, irq: IrqInfo, count: int = 1, start: int = 0) -> list[int]:
    """New eventfds for `count` interrupts, wired in one message."""
    fds = [peer.eventfd() for _ in range(count)]
    what = f"{count} eventfds for index {irq.index} from {start}"
    await peer.granted(SET_IRQS, body(EVENTFD | TRIGGER, irq, start, count), fds, what=what)
    return fds


async def fire(peer: Peer, irq: IrqInfo, start: int = 0, count: int = 1) -> Message:
    """Ask the server to signal interrupts; the answer may be a refusal where nothing is wired."""
    return await peer.ask(SET_IRQS, body(NONE | TRIGGER, irq, start, count))


async def heard(peer: Peer, fd: int, what: str) -> int:
    """How often an eventfd was signalled, once it was."""
    with trio.move_on_after(peer.patience) as late:
        await trio.lowlevel.wait_readable(fd)
    expect(not late.cancelled_caught, f"a signal of {what}", f"none within {peer.patience:g} s")
    return os.eventfd_read(fd)


async def silent(peer: Peer, fds: Sequence[int], what: str) -> None:
    """None of them was signalled by what was answered up to now."""
    await peer.quiet("what was answered")
    for number, fd in enumerate(fds):
        try:
            count = os.eventfd_read(fd)
        except BlockingIOError:
            continue
        raise Failed(f"no signal {what}", f"{count} of number {number}")


@section.check(MUST)
async def reply(server: Server) -> None:
    """The reply has no payload."""
    async with server.session() as peer:
        irq = await vectors(peer)
        answer = await peer.granted(SET_IRQS, body(EVENTFD | TRIGGER, irq), [peer.eventfd()])
        expect(not answer.payload, "a header alone", answer)


@section.check(MUST)
async def trigger(server: Server) -> None:
    """TRIGGER with DATA_NONE fires all interrupts of the range: 1 is written to each eventfd."""
    async with server.session() as peer:
        irq = await vectors(peer)
        count = min(irq.count, 4)
        fds = await wire(peer, irq, count)
        answer = await fire(peer, irq, count=count)
        expect(not answer.refused, "that TRIGGER is granted", answer)
        for number, fd in enumerate(fds):
            got = await heard(peer, fd, f"interrupt {number}")
            expect(got == 1, f"1 in the eventfd of interrupt {number}", got)


@section.check(MUST)
async def trigger_some(server: Server) -> None:
    """TRIGGER with DATA_BOOL fires those that are true, and no others."""
    async with server.session() as peer:
        irq = await vectors(peer, at_least=3)
        fds = await wire(peer, irq, 3)
        await peer.granted(SET_IRQS, body(BOOL | TRIGGER, irq, 0, 3, b"\1\0\1"))
        await heard(peer, fds[0], "interrupt 0")
        await heard(peer, fds[2], "interrupt 2")
        await silent(peer, fds, "of one that is false")


@section.check(MUST)
async def trigger_a_range(server: Server) -> None:
    """`start` counts from the first interrupt of the index."""
    async with server.session() as peer:
        irq = await vectors(peer, at_least=3)
        fds = await wire(peer, irq, 3)
        await fire(peer, irq, start=1, count=1)
        await heard(peer, fds[1], "interrupt 1")
        await silent(peer, fds, "outside of the range")


@section.check(MUST)
async def replace_descriptor(server: Server) -> None:
    """A new eventfd takes the place of the one before."""
    async with server.session() as peer:
        irq = await vectors(peer)
        old = await wire(peer, irq)
        new = await wire(peer, irq)
        await fire(peer, irq)
        await heard(peer, new[0], "the new eventfd")
        await silent(peer, old, "of the eventfd that was replaced")


@section.check(MUST)
async def take_away(server: Server) -> None:
    """DATA_EVENTFD without descriptors takes away those that were there."""
    async with server.session() as peer:
        irq = await vectors(peer)
        fds = await wire(peer, irq)
        await peer.granted(SET_IRQS, body(EVENTFD | TRIGGER, irq), what="without descriptors")
        await fire(peer, irq)
        await silent(peer, fds, "of an eventfd that was taken away")


@section.check(MUST)
async def take_one_away(server: Server) -> None:
    """Of several interrupts one can be taken away, and the others go on."""
    async with server.session() as peer:
        irq = await vectors(peer, at_least=3)
        fds = await wire(peer, irq, 3)
        await peer.granted(
            SET_IRQS, body(EVENTFD | TRIGGER, irq, 1, 1), what="interrupt 1 without descriptor"
        )
        for number in range(3):
            await fire(peer, irq, start=number)
        await heard(peer, fds[0], "interrupt 0")
        await heard(peer, fds[2], "interrupt 2")
        await silent(peer, fds, "of an eventfd that was taken away")


@section.check(MUST)
async def disable(server: Server) -> None:
    """DATA_NONE with count and start 0 disables all interrupts of the index."""
    async with server.session() as peer:
        irq = await vectors(peer)
        count = min(irq.count, 3)
        fds = await wire(peer, irq, count)
        await peer.granted(SET_IRQS, body(NONE | TRIGGER, irq, 0, 0), what="count 0")
        await fire(peer, irq, count=count)
        await silent(peer, fds, "of a disabled index")
        await wire(peer, irq, count)


@section.check(MUST)
async def every_kind(server: Server) -> None:
    """Each kind of interrupt that says EVENTFD takes one and signals it."""
    async with server.session() as peer:
        for irq in await irqs(peer):
            if irq.count and IrqInfoFlags.EVENTFD in irq.flags:
                fds = await wire(peer, irq)
                await peer.granted(SET_IRQS, body(NONE | TRIGGER, irq), what=f"index {irq.index}")
                await heard(peer, fds[0], f"index {irq.index}")
                await peer.granted(
                    SET_IRQS, body(NONE | TRIGGER, irq, 0, 0), what=f"index {irq.index}, count 0"
                )


@section.check(MUST)
async def kinds_are_separate(server: Server) -> None:
    """The eventfd of one kind of interrupt is not that of another."""
    async with server.session() as peer:
        irq = await vectors(peer)
        found = await irqs(peer)
        if len(found) <= IrqIndex.ERR or not found[IrqIndex.ERR].count:
            raise NotApplicable("the device has no error interrupt")
        fds = await wire(peer, irq)
        other = await wire(peer, found[IrqIndex.ERR])
        await fire(peer, irq)
        await heard(peer, fds[0], f"index {irq.index}")
        await silent(peer, other, "of the error interrupt")


@section.check(MUST)
async def all_vectors(server: Server) -> None:
    """Every interrupt of an index can be wired, in as many messages as descriptors allow."""
    async with server.session() as peer:
        irq = await vectors(peer)
        most = peer.limit("max_msg_fds", 1)
        if not most:
            raise NotApplicable("the server takes no descriptors")
        if irq.count > most and IrqInfoFlags.NORESIZE in irq.flags:
            raise NotApplicable(f"{irq.count} interrupts that cannot be wired in pieces")
        fds: list[int] = []
        while len(fds) < irq.count:
            fds += await wire(peer, irq, min(most, irq.count - len(fds)), start=len(fds))
        await fire(peer, irq, start=irq.count - 1)
        await heard(peer, fds[-1], "the last interrupt")


@section.check(MUST)
async def mask(server: Server) -> None:
    """What says MASKABLE takes MASK and UNMASK, with DATA_NONE and with DATA_BOOL."""
    async with server.session() as peer:
        tried = False
        for irq in await irqs(peer):
            if not irq.count or IrqInfoFlags.MASKABLE not in irq.flags:
                continue
            tried = True
            await wire(peer, irq)
            for action in (MASK, UNMASK):
                await peer.granted(SET_IRQS, body(NONE | action, irq), what=f"{action!r} of {irq.index}")
                what = f"{action!r} of {irq.index} with a boolean"
                await peer.granted(SET_IRQS, body(BOOL | action, irq, 0, 1, b"\1"), what=what)
            await peer.granted(SET_IRQS, body(NONE | TRIGGER, irq, 0, 0), what="count 0")
        if not tried:
            raise NotApplicable("no kind of interrupt is maskable")


@section.check(EXTENSION)
async def unmask_descriptor(server: Server) -> None:
    """INTx takes an eventfd that unmasks it (KVM's resamplefd), as the kernel does."""
    async with server.session() as peer:
        found = await irqs(peer)
        if not found or not found[IrqIndex.INTX].count:
            raise NotApplicable("the device has no INTx")
        irq = found[IrqIndex.INTX]
        if IrqInfoFlags.AUTOMASKED not in irq.flags:
            raise NotApplicable("INTx does not say that it masks itself")
        await wire(peer, irq)
        await peer.granted(SET_IRQS, body(EVENTFD | UNMASK, irq), [peer.eventfd()], what="to unmask INTx")


@section.check(MUST)
async def one_kind_of_data(server: Server) -> None:
    """Exactly one DATA flag is set, else the command is refused."""
    async with server.session() as peer:
        irq = await vectors(peer)
        for flags in (TRIGGER, NONE | BOOL | TRIGGER, NONE | EVENTFD | TRIGGER, BOOL | EVENTFD | TRIGGER):
            await peer.refused(SET_IRQS, body(flags, irq, 0, 1, b"\1"), what=repr(flags))


@section.check(MUST)
async def one_action(server: Server) -> None:
    """Exactly one ACTION flag is set, else the command is refused."""
    async with server.session() as peer:
        irq = await vectors(peer)
        for flags in (NONE, NONE | MASK | UNMASK, NONE | MASK | TRIGGER, NONE | UNMASK | TRIGGER):
            await peer.refused(SET_IRQS, body(flags, irq), what=repr(flags))


@section.check(EXTENSION)
async def undefined_flags(server: Server) -> None:
    """Flags that are not defined are refused, as the kernel does."""
    async with server.session() as peer:
        irq = await vectors(peer)
        await wire(peer, irq)
        await peer.refused(SET_IRQS, body(NONE | TRIGGER | 1 << 9, irq), what="flag 0x200")


@section.check(MUST)
async def beyond_index(server: Server) -> None:
    """An index that is not there is refused."""
    async with server.session() as peer:
        for index in (len(await irqs(peer)), 0xFFFFFFFF):
            await peer.refused(SET_IRQS, body(NONE | TRIGGER, index), what=f"index {index}")


@section.check(MUST)
async def beyond_count(server: Server) -> None:
    """A range that the index does not have is refused."""
    async with server.session() as peer:
        irq = await vectors(peer)
        await wire(peer, irq)
        for start, count in ((irq.count, 1), (0, irq.count + 1), (irq.count - 1, 2), (0, 0xFFFFFFFF)):
            what = f"{count} interrupts from {start} of {irq.count}"
            await peer.refused(SET_IRQS, body(NONE | TRIGGER, irq, start, count), what=what)


@section.check(MUST)
async def range_wraps(server: Server) -> None:
    """A range whose end wraps around 32 bits is refused."""
    async with server.session() as peer:
        irq = await vectors(peer)
        await wire(peer, irq)
        for flags, data in ((NONE | TRIGGER, b""), (EVENTFD | TRIGGER, b""), (BOOL | TRIGGER, bytes(2))):
            wrapping = body(flags, irq, 0xFFFFFFFF, 2, data)
            await peer.refused(SET_IRQS, wrapping, what=f"2 interrupts from 0xffffffff with {flags!r}")
        fds = [peer.eventfd(), peer.eventfd()]
        wrapping = body(EVENTFD | TRIGGER, irq, 0xFFFFFFFF, 2)
        await peer.refused(SET_IRQS, wrapping, fds, what="2 eventfds from 0xffffffff")


@section.check(SHOULD)
async def descriptors_for_all(server: Server) -> None:
    """As many descriptors come as interrupts are named, or none: another number is refused."""
    async with server.session() as peer:
        irq = await vectors(peer, at_least=2)
        fds = [peer.eventfd() for _ in range(3)]
        await peer.refused(SET_IRQS, body(EVENTFD | TRIGGER, irq, 0, 2), fds[:1], what="1 descriptor for 2")
        await peer.refused(SET_IRQS, body(EVENTFD | TRIGGER, irq, 0, 2), fds, what="3 descriptors for 2")


@section.check(SHOULD)
async def booleans_for_all(server: Server) -> None:
    """As many booleans come as interrupts are named: fewer are refused."""
    async with server.session() as peer:
        irq = await vectors(peer, at_least=2)
        await wire(peer, irq, 2)
        await peer.refused(SET_IRQS, body(BOOL | TRIGGER, irq, 0, 2, b"\1"), what="1 boolean for 2")


@section.check(EXTENSION)
async def small_argsz(server: Server) -> None:
    """An argsz below the size of the record is refused, as the kernel does."""
    async with server.session() as peer:
        irq = await vectors(peer)
        small = replace(SetIrqs.decode(body(NONE | TRIGGER, irq)), argsz=SetIrqs.size - 1)
        await peer.refused(SET_IRQS, small, what="argsz 19 of 20")


@section.check(EXTENSION)
async def no_eventfd(server: Server) -> None:
    """A descriptor that is no eventfd is refused, as the kernel does."""
    async with server.session() as peer:
        irq = await vectors(peer)
        await peer.refused(SET_IRQS, body(EVENTFD | TRIGGER, irq), [peer.memory(4096).fd], what="a memfd")


@section.check(SHOULD)
async def refused_changes_nothing(server: Server) -> None:
    """A refused command leaves what was wired as it was."""
    async with server.session() as peer:
        irq = await vectors(peer)
        fds = await wire(peer, irq)
        beyond = body(EVENTFD | TRIGGER, irq, irq.count, 1)
        await peer.refused(SET_IRQS, beyond, [peer.eventfd()], what="an interrupt that is not there")
        await fire(peer, irq)
        await heard(peer, fds[0], "the eventfd that was wired before")


@section.check(MUST)
async def posted(server: Server) -> None:
    """A command that wants no reply is done before later ones."""
    async with server.session() as peer:
        irq = await vectors(peer)
        fd = peer.eventfd()
        wiring = message(SET_IRQS, body(EVENTFD | TRIGGER, irq), flags=HeaderFlags.NO_REPLY)
        await peer.send(wiring, [fd])
        answer = await fire(peer, irq)
        expect(not answer.refused, "that TRIGGER is granted", answer)
        await heard(peer, fd, "an eventfd wired without a reply")


@section.check(MUST)
async def client_takes_them_along(server: Server) -> None:
    """When a client left, its eventfds are signalled no more."""
    async with server.session() as peer:
        irq = await vectors(peer)
        fds = await wire(peer, irq)
        peer.hang_up()
        await server.serves_on("a client with an interrupt")
        if await server.host.ended():
            raise NotApplicable("the server ends with its client")
        async with server.session() as other:
            await fire(other, irq)
            await silent(other, fds, "of a client that left")


@section.check(EXTENSION)
async def stay_at_reset(server: Server) -> None:
    """A reset leaves eventfds wired, as the kernel does."""
    async with server.session() as peer:
        await resettable(peer)
        irq = await vectors(peer)
        fds = await wire(peer, irq)
        await peer.granted(Command.DEVICE_RESET)
        await fire(peer, irq)
        await heard(peer, fds[0], "an eventfd wired before the reset")
