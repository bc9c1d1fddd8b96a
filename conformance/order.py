"""Checks of pipelining, of the stream that messages are cut from, and of clients that come and go."""

from __future__ import annotations

from typing import Final

from conformance._device import scratch, scratch_read, scratch_write
from conformance._memory import IOVA, PAGE, Memory
from conformance._messages import message, version
from conformance._peer import CAPABILITIES, Peer, pipelined
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import DeviceInfo, DmaMap, HeaderFlags, IrqInfo, Record
from protocol.vfio import DmaMapFlags

section = Section("order", "Command Concurrency")
stream = Section("stream", "Socket")
disconnect = Section("disconnect", "Socket Disconnection Behavior")

MANY: Final = 300
"""Requests in flight: several times what a unix socket's buffer holds of either end's messages."""

ASK: Final = DeviceInfo(DeviceInfo.size).encode()
BOTH: Final = DmaMapFlags.READ | DmaMapFlags.WRITE


@section.check(MUST)
async def pipelining(server: Server) -> None:
    """Commands may be sent before earlier ones are answered, and are answered in their order."""
    async with server.session() as peer:
        await pipelined(peer, [(Command.DEVICE_GET_INFO, ASK)] * 32)


@section.check(MUST)
async def mixed(server: Server) -> None:
    """Commands of different kinds are handled in the order of their arrival."""
    async with server.session() as peer:
        requests: list[tuple[int, Record]] = [
            (Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size)),
            (Command.DEVICE_GET_IRQ_INFO, IrqInfo(IrqInfo.size)),
            (Command.REGION_READ, scratch_read()),
        ]
        await pipelined(peer, requests * 8)


@section.check(MUST)
async def many_in_flight(server: Server) -> None:
    """Neither end stalls while more is in flight than the sockets hold."""
    async with server.session() as peer:
        await pipelined(peer, [(Command.DEVICE_GET_INFO, ASK)] * MANY)


@section.check(MUST)
async def posted_before_answered(server: Server) -> None:
    """A command with No_reply is done before the reply to a later one is sent."""
    async with server.session() as peer, scratch(peer):
        for value in (b"\x5a", b"\xa5", b"\x11"):
            posted = scratch_write(value)
            await peer.send(message(Command.REGION_WRITE, posted, flags=HeaderFlags.NO_REPLY))
            reply = await peer.granted(Command.REGION_READ, scratch_read())
            expect(reply.payload[16:] == value, f"the posted {value!r}", reply.payload[16:])


@section.check(MUST)
async def writes_in_order(server: Server) -> None:
    """Pipelined writes and reads see each other in the order of their arrival."""
    async with server.session() as peer, scratch(peer):
        requests: list[tuple[int, bytes | Record]] = []
        for value in range(16):
            requests.append((Command.REGION_WRITE, scratch_write(bytes([value]))))
            requests.append((Command.REGION_READ, scratch_read()))
        replies = await pipelined(peer, requests)
        seen = [reply.payload[16:] for reply in replies[1::2]]
        expect(seen == [bytes([value]) for value in range(16)], "each value that was just written", seen)


@stream.check(MUST)
async def byte_by_byte(server: Server) -> None:
    """A message may arrive one byte at a time."""
    async with server.session() as peer:
        for byte in message(Command.DEVICE_GET_INFO, ASK, message_id=5):
            await peer.send(bytes([byte]))
            await peer.settle()
        await peer.reply_to(Command.DEVICE_GET_INFO, 5)


@stream.check(MUST)
async def cut_anywhere(server: Server) -> None:
    """A message may arrive in two pieces, cut anywhere."""
    whole = message(Command.DEVICE_GET_INFO, ASK, message_id=5)
    async with server.session() as peer:
        for cut in range(1, len(whole)):
            await peer.send(whole[:cut])
            await peer.settle()
            await peer.send(whole[cut:])
            await peer.reply_to(Command.DEVICE_GET_INFO, 5)


@stream.check(MUST)
async def joined(server: Server) -> None:
    """Messages may arrive many in a piece, the last of them cut."""
    whole = b"".join(message(Command.DEVICE_GET_INFO, ASK, message_id=number) for number in range(20))
    async with server.session() as peer:
        await peer.send(whole[:-7])
        for number in range(19):
            await peer.reply_to(Command.DEVICE_GET_INFO, number)
        await peer.send(whole[-7:])
        await peer.reply_to(Command.DEVICE_GET_INFO, 19)


def _window(memory: Memory, address: int) -> bytes:
    return DmaMap(DmaMap.size, BOTH, 0, address, memory.length).encode()


@stream.check(MUST)
async def descriptor_of_a_cut_message(server: Server) -> None:
    """A message whose descriptor came with its first bytes may be cut after them."""
    async with server.session() as peer:
        memory = peer.memory(PAGE)
        whole = message(Command.DMA_MAP, _window(memory, IOVA), message_id=6)
        for cut in (16, 17, len(whole) - 1):
            await peer.send(whole[:cut], [memory.fd])
            await peer.settle()
            await peer.send(whole[cut:])
            reply = await peer.reply_to(Command.DMA_MAP, 6)
            expect(not reply.refused, f"that DMA_MAP cut at {cut} is granted", reply)
            await peer.unmapped(IOVA, PAGE)


@stream.check(MUST)
async def descriptors_keep_to_their_message(server: Server) -> None:
    """Each of several pipelined messages has the descriptor that came with it."""
    async with server.session() as peer:
        small, large = peer.memory(PAGE), peer.memory(16 * PAGE)
        # Swapped, the larger window would not fit its file.
        await peer.send(message(Command.DEVICE_GET_INFO, ASK, message_id=1))
        await peer.send(message(Command.DMA_MAP, _window(small, IOVA), message_id=2), [small.fd])
        await peer.send(message(Command.DMA_MAP, _window(large, 2 * IOVA), message_id=3), [large.fd])
        await peer.reply_to(Command.DEVICE_GET_INFO, 1)
        for number in (2, 3):
            reply = await peer.reply_to(Command.DMA_MAP, number)
            expect(not reply.refused, "that DMA_MAP is granted", reply)


@disconnect.check(SHOULD)
async def reconnect(server: Server) -> None:
    """A server whose client left serves the next one, or ends of its own will."""
    for _ in range(3):
        async with server.session() as peer:
            await peer.quiet("VERSION")
        await server.serves_on("a client that left")


@disconnect.check(SHOULD)
async def before_version(server: Server) -> None:
    """A client that leaves without a word does no harm."""
    async with server.connect():
        pass
    await server.serves_on("a client that said nothing")


@disconnect.check(SHOULD)
async def within_a_message(server: Server) -> None:
    """A client that leaves within a message does no harm."""
    whole = message(Command.VERSION, version(CAPABILITIES))
    for cut in (1, 15, 16, 20):
        async with server.connect() as peer:
            await peer.send(whole[:cut])
        await server.serves_on(f"{cut} bytes of VERSION")
    for cut in (1, 15, 16, 20):
        async with server.session() as peer:
            await peer.send(message(Command.DEVICE_GET_INFO, ASK)[:cut])
        await server.serves_on(f"{cut} bytes of DEVICE_GET_INFO")


@disconnect.check(SHOULD)
async def with_replies_unread(server: Server) -> None:
    """A client that leaves without reading its replies does no harm."""
    async with server.session() as peer:
        for _ in range(32):
            await peer.send(message(Command.DEVICE_GET_INFO, ASK))
    await server.serves_on("unread replies")


@disconnect.check(MUST)
async def memory_is_released(server: Server) -> None:
    """When the client left, its memory is mapped no more."""
    async with server.session() as peer:
        memory = peer.memory(4 * PAGE)
        await peer.mapped(IOVA, memory)
        peer.hang_up()
        await server.serves_on("a client with a window")
        await server.eventually(memory.seal, "that the client's memory is unmapped")


@disconnect.check(MUST)
async def windows_are_forgotten(server: Server) -> None:
    """The next client's windows are its own: nothing of the last one's is in their way."""
    for _ in range(2):
        async with server.session() as peer:
            await peer.mapped(IOVA, peer.memory(PAGE), what="by a new client")


@disconnect.check(SHOULD)
async def state_is_kept(server: Server) -> None:
    """Apart from windows and interrupts, the device's state is retained for the next client."""
    async with server.session() as peer:
        async with scratch(peer) as before:
            left = bytes([before[0] ^ 0xFF])
        await _put(peer, left)
    if await server.host.ended():
        raise NotApplicable("the server ends with its client")
    async with server.session() as peer:
        found = (await peer.granted(Command.REGION_READ, scratch_read())).payload[16:]
        await _put(peer, before)
        expect(found == left, f"the register as it was left, {left!r}", repr(found))


async def _put(peer: Peer, value: bytes) -> None:
    await peer.granted(Command.REGION_WRITE, scratch_write(value))


@disconnect.check(EXTENSION)
async def second_client(server: Server) -> None:
    """A second client disturbs the first in nothing, whether it is served or waits."""
    async with server.session() as peer, server.connect() as other:
        await other.send(message(Command.VERSION, version(CAPABILITIES)))
        for _ in range(5):
            await peer.quiet("another client")
