"""Checks of the header, of who may ask for what, and of descriptors that come along."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from conformance._messages import message
from conformance._peer import HungUp, Peer
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, Failed, Section, expect
from protocol import Command, Role
from protocol.commands import SHAPES
from protocol.messages import DeviceInfo, HeaderFlags, RegionInfo

section = Section("header", "Header")
commands = Section("commands", "Commands")

ASK: Final = DeviceInfo(DeviceInfo.size).encode()
GET_INFO: Final = Command.DEVICE_GET_INFO


@section.check(MUST)
async def message_id(server: Server) -> None:
    """The message id is echoed in the reply, whatever it is."""
    async with server.session() as peer:
        for number in (0, 1, 0x1234, 0x8000, 0xFFFF):
            await peer.send(message(GET_INFO, ASK, message_id=number))
            await peer.reply_to(GET_INFO, number)


@section.check(MUST)
async def message_id_again(server: Server) -> None:
    """Message ids may be used again, also while an earlier one still waits."""
    async with server.session() as peer:
        await peer.send(message(GET_INFO, ASK, message_id=7) * 3)
        for _ in range(3):
            reply = await peer.reply_to(GET_INFO, 7)
            expect(not reply.refused, "that an id may be used again", reply)


@section.check(MUST)
async def reply_flags(server: Server) -> None:
    """A reply has type 1, and the error bit only where the command failed."""
    async with server.session() as peer:
        good = await peer.granted(GET_INFO, ASK)
        expect(good.flags == HeaderFlags.REPLY, "flags 0x1", hex(good.flags))
        bad = await peer.refused(0xEEEE, what="a command that is none")
        expect(bad.flags == HeaderFlags.REPLY | HeaderFlags.ERROR, "flags 0x21", hex(bad.flags))


@section.check(MUST)
async def error_is_header_only(server: Server) -> None:
    """An error reply is the header alone."""
    async with server.session() as peer:
        beyond = RegionInfo(RegionInfo.size, index=0xFFFFFFFF)
        for command, payload in ((0xEEEE, b""), (Command.DEVICE_GET_REGION_INFO, beyond.encode())):
            bad = await peer.refused(command, payload, what="what does not exist")
            expect(not bad.payload and not bad.fds, "a header alone", bad)


@section.check(SHOULD)
async def error_number(server: Server) -> None:
    """The error of an error reply is an errno."""
    async with server.session() as peer:
        bad = await peer.refused(0xEEEE, what="a command that is none")
        expect(0 <= bad.error < 4096, "an errno, or 0", bad.error)


@section.check(MUST)
async def no_reply(server: Server) -> None:
    """A command with No_reply is not answered."""
    async with server.session() as peer:
        await peer.send(message(GET_INFO, ASK, message_id=1, flags=HeaderFlags.NO_REPLY))
        await peer.quiet("a command with No_reply")


@section.check(MUST)
async def no_reply_refused(server: Server) -> None:
    """A command with No_reply is not answered when it fails, either."""
    async with server.session() as peer:
        beyond = RegionInfo(RegionInfo.size, index=0xFFFFFFFF).encode()
        asked = message(Command.DEVICE_GET_REGION_INFO, beyond, message_id=1, flags=HeaderFlags.NO_REPLY)
        await peer.send(asked)
        await peer.quiet("a failed command with No_reply")


@section.check(MUST)
async def reserved_error(server: Server) -> None:
    """The error field of a command is reserved, and so without effect."""
    async with server.session() as peer:
        reply = await peer.ask(GET_INFO, ASK, error=22)
        expect(not reply.refused, "that DEVICE_GET_INFO is granted", reply)


@section.check(EXTENSION)
async def error_in_command(server: Server) -> None:
    """The error bit means nothing in a command: it is answered, granted or refused."""
    async with server.session() as peer:
        await peer.ask(GET_INFO, ASK, flags=HeaderFlags.ERROR)
        await peer.quiet("what was answered")


@section.check(EXTENSION)
async def undefined_flags(server: Server) -> None:
    """Flags that are not defined do not keep a command from being answered."""
    async with server.session() as peer:
        await peer.ask(GET_INFO, ASK, flags=1 << 17)
        await peer.quiet("what was answered")


async def _lives_through(server: Server, data: bytes, what: str) -> None:
    """The server may answer, hang up or wait for more, but serves the next client."""
    async with server.session() as peer:
        with suppress(HungUp, Failed):
            await peer.send(data)
            with trio.move_on_after(server.patience / 4):
                await peer.next()
    await server.serves_on(what)


@section.check(SHOULD)
async def size_below_header(server: Server) -> None:
    """A message size below that of the header does not end the server."""
    for size in (0, 1, 15):
        await _lives_through(server, message(GET_INFO, size=size), f"a message of {size} bytes")


@section.check(SHOULD)
async def size_beyond_all(server: Server) -> None:
    """A message size of 4 GiB does not end the server."""
    await _lives_through(server, message(GET_INFO, ASK, size=0xFFFFFFFF), "a message of 4 GiB")


@section.check(SHOULD)
async def unknown_type(server: Server) -> None:
    """A message that is neither command nor reply does not end the server."""
    for kind in (2, 0xF):
        await _lives_through(server, message(GET_INFO, ASK, flags=kind), f"a message of type {kind}")


@section.check(SHOULD)
async def stray_reply(server: Server) -> None:
    """A reply to nothing does not end the server."""
    await _lives_through(server, message(GET_INFO, ASK, flags=HeaderFlags.REPLY), "a reply to nothing")


@section.check(SHOULD)
async def noise(server: Server) -> None:
    """Bytes that are no message do not end the server."""
    await _lives_through(server, bytes(range(255, 0, -1)) * 4, "noise")


@commands.check(MUST)
async def unknown(server: Server) -> None:
    """A command that does not exist is answered with an error, and the session goes on."""
    async with server.session() as peer:
        for number in (0, 19, 255, 0xFFFF):
            await peer.refused(number, what="a command that is none")
        await peer.quiet("what was answered")


@commands.check(MUST)
async def unknown_with_payload(server: Server) -> None:
    """The payload of a command that does not exist is taken out of the stream."""
    async with server.session() as peer:
        for size in (1, 16, 4096):
            await peer.refused(
                0xEEEE, bytes(range(256)) * 16 if size == 4096 else bytes(size), what="unknown"
            )
        await peer.quiet("what was answered")


@commands.check(SHOULD)
async def withdrawn(server: Server) -> None:
    """Command 14, of earlier versions, does not exist any more."""
    async with server.session() as peer:
        await peer.refused(14, bytes(16), what="a command that was withdrawn")


@commands.check(MUST)
async def of_servers(server: Server) -> None:
    """DMA_READ and DMA_WRITE are commands to clients: a server refuses them."""
    async with server.session() as peer:
        for command, size in ((Command.DMA_READ, 16), (Command.DMA_WRITE, 24)):
            await peer.refused(command, bytes(size), what="a server's own command")


@commands.check(MUST)
async def every_one_answered(server: Server) -> None:
    """Each command is answered, supported or not."""
    async with server.session() as peer:
        for command in Command:
            if command not in (Command.VERSION, Command.DEVICE_RESET):
                await peer.ask(command, bytes(64))
        await peer.quiet("what was answered")


@commands.check(SHOULD)
async def too_short(server: Server) -> None:
    """A command too short for its record is refused."""
    async with server.session() as peer:
        for command in Command:
            size = _record_size(command)
            for cut in {0, size - 1} if size else ():
                await peer.refused(command, b"\xff" * cut, what=f"{cut} bytes of {size}")
        await peer.quiet("what was answered")


def _record_size(command: Command) -> int:
    """Bytes that a client's request has at least; 0 for one without a record, and for VERSION."""
    shape = SHAPES[command]
    if shape.sender is not Role.CLIENT or command == Command.VERSION:
        return 0
    return shape.request.size


descriptors = Section("descriptors", "VFIO_USER_VERSION, max_msg_fds")


def _pipes(peer: Peer, count: int) -> list[tuple[int, int]]:
    made = [os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) for _ in range(count)]
    for ends in made:
        for end in ends:
            peer.own(end)
    return made


async def _all_closed(server: Server, pipes: Sequence[tuple[int, int]], what: str) -> None:
    """The writing ends are gone everywhere: the reading ones say so."""
    for reader, _ in pipes:
        poll = select.poll()
        poll.register(reader, select.POLLHUP)
        await server.eventually(partial(_hung_up, poll), f"that {what} is closed")


def _hung_up(poll: select.poll) -> bool:
    return bool(poll.poll(0))


@descriptors.check(SHOULD)
async def unwanted_are_closed(server: Server) -> None:
    """A descriptor that a command has no use for does not stay open in the server."""
    async with server.session() as peer:
        pipes = _pipes(peer, 1)
        await peer.ask(GET_INFO, ASK, [pipes[0][1]])
        peer.let_go(pipes[0][1])
        await peer.quiet("what was answered")
        await _all_closed(server, pipes, "a descriptor that came with DEVICE_GET_INFO")


@descriptors.check(SHOULD)
async def refused_are_closed(server: Server) -> None:
    """Descriptors of a refused command do not stay open in the server."""
    async with server.session() as peer:
        pipes = _pipes(peer, 1)
        await peer.refused(0xEEEE, b"", [pipes[0][1]], what="a command that is none")
        peer.let_go(pipes[0][1])
        await peer.quiet("what was answered")
        await _all_closed(server, pipes, "a descriptor of a refused command")


@descriptors.check(SHOULD)
async def of_half_a_message_are_closed(server: Server) -> None:
    """Descriptors of a message that never became whole are closed when the client leaves."""
    async with server.session() as peer:
        pipes = _pipes(peer, 1)
        await peer.send(message(Command.DMA_MAP, bytes(32))[:20], [pipes[0][1]])
        peer.let_go(pipes[0][1])
        peer.hang_up()
        await server.serves_on("half a message with a descriptor")
        await _all_closed(server, pipes, "a descriptor of half a message")


@descriptors.check(SHOULD)
async def too_many(server: Server) -> None:
    """More descriptors than the server says it takes are all closed; it serves on."""
    async with server.session() as peer:
        most = peer.limit("max_msg_fds", 1)
        pipes = _pipes(peer, min(most + 1, 250))
        with suppress(HungUp):
            await peer.send(message(GET_INFO, ASK), [end for _, end in pipes])
            await peer.next()
        for _, end in pipes:
            peer.let_go(end)
        peer.hang_up()
        await server.serves_on(f"{len(pipes)} descriptors in a message")
        await _all_closed(server, pipes, f"each of {len(pipes)} descriptors")
