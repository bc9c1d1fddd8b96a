"""Checks of what a server asks of its client: a virtio network card is made to send a frame that lies in
memory without a descriptor. Other devices do no DMA that a stranger could bring about.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from conformance._memory import IOVA
from conformance._messages import JSON
from conformance._peer import CAPABILITIES, Peer
from conformance._server import Server
from conformance._virtio import LENGTH, Transmitter, transmitter
from conformance.checks import MUST, SHOULD, Failed, NotApplicable, Section, Silent, expect
from conformance.version import TWIN
from protocol import Command
from protocol.messages import DmaAccess

section = Section("dma-access", "VFIO_USER_DMA_READ, VFIO_USER_DMA_WRITE")

SMALL: Final[JSON] = {**CAPABILITIES, "max_data_xfer_size": 32}


@asynccontextmanager
async def _sending(server: Server, capabilities: JSON = CAPABILITIES) -> AsyncIterator[Transmitter]:
    """A card that is about to send; afterwards it is reset."""
    async with server.session(capabilities) as peer:
        card = await transmitter(peer)
        yield card
        await peer.granted(Command.DEVICE_RESET)


async def _asks(card: Transmitter) -> None:
    """Offer a frame and wait for the first question; it may come before the doorbell's reply."""
    await card.send()
    if not card.peer.asked:
        try:
            await card.peer.listen("a DMA_READ")
        except Silent:
            raise NotApplicable("the server does no DMA by message") from None


async def _sent(card: Transmitter) -> None:
    """The frame is sent, by answers to questions."""
    await _asks(card)
    with trio.move_on_after(card.peer.patience):
        while not card.sent:
            await card.peer.listen("a DMA_READ or DMA_WRITE")
    expect(card.sent == 1, "one frame sent, by messages alone", card.sent)


def _asked(peer: Peer) -> list[tuple[str, int, DmaAccess, int]]:
    """(socket, command, record, bytes of data) of the server's questions."""
    return [
        (over, found.command, DmaAccess.decode(found.payload), len(found.payload) - DmaAccess.size)
        for over, found in peer.asked
    ]


@section.check(MUST, destructive=True)
async def memory_without_descriptor(server: Server) -> None:
    """Memory without a descriptor is reached by DMA_READ and DMA_WRITE."""
    async with _sending(server) as card:
        try:
            await _sent(card)
        except NotApplicable as reason:
            raise Failed("a DMA_READ of the queue in that memory", str(reason)) from None


@section.check(MUST, destructive=True)
async def form(server: Server) -> None:
    """A request names what was mapped; DMA_READ has no data, DMA_WRITE as many as it says."""
    async with _sending(server) as card:
        await _sent(card)
        for _, command, body, data in _asked(card.peer):
            inside = body.address >= IOVA and body.address + body.count <= IOVA + LENGTH
            expect(inside, "an access within the window", body.pretty())
            wanted = body.count if command == Command.DMA_WRITE else 0
            expect(data == wanted, f"{wanted} bytes of data", data)


@section.check(MUST, destructive=True)
async def size(server: Server) -> None:
    """No transfer is larger than the client's max_data_xfer_size."""
    async with _sending(server, SMALL) as card:
        await _sent(card)
        for _, _, body, _ in _asked(card.peer):
            expect(body.count <= 32, "at most 32 bytes", body.pretty())


@section.check(MUST, destructive=True)
async def over_the_twin(server: Server) -> None:
    """With a twin socket the server's requests go there, and else on the main socket."""
    for capabilities, wanted in ((CAPABILITIES, "main"), (TWIN, "twin")):
        async with _sending(server, capabilities) as card:
            if wanted == "twin" and not card.peer.has_twin:
                raise NotApplicable("the server sets up no twin socket")
            await _sent(card)
            sockets = {over for over, *_ in _asked(card.peer)}
            expect(sockets == {wanted}, f"questions over the {wanted} socket", sorted(sockets))


@section.check(MUST, destructive=True)
async def no_stall(server: Server) -> None:
    """While the server waits for an answer, it goes on with the client's commands."""
    async with server.session(TWIN) as peer:
        card = await transmitter(peer)
        if not peer.has_twin:
            raise NotApplicable("the server sets up no twin socket, and its questions come between replies")
        await card.send()
        for _ in range(3):
            await peer.quiet("the doorbell")
        await peer.listen("a DMA_READ")
        await peer.granted(Command.DEVICE_RESET)


@section.check(SHOULD, destructive=True)
async def refused(server: Server) -> None:
    """A client that refuses does not end the session."""
    async with _sending(server) as card:
        card.peer.windows.clear()
        await _asks(card)
        await card.peer.quiet("what was refused")


@section.check(SHOULD, destructive=True)
async def unanswered(server: Server) -> None:
    """A client that leaves without an answer does no harm."""
    async with server.session() as peer:
        card = await transmitter(peer)
        peer.answers = False
        await _asks(card)
    await server.serves_on("a question without an answer")
