"""Checks of the beginning of a session."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from typing import Any, Final

from conformance._messages import JSON, announced, message, version
from conformance._peer import CAPABILITIES, HungUp, Peer
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, Failed, NotApplicable, Section, expect
from protocol import Command
from protocol.limits import MAX_DATA_XFER_SIZE, MAX_MSG_FDS
from protocol.messages import DeviceInfo, HeaderFlags

section = Section("version", "VFIO_USER_VERSION")

TWIN: Final[JSON] = {**CAPABILITIES, "twin_socket": {"supported": True}}
EVERYTHING: Final[JSON] = {
    **TWIN,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "write_multiple": True,
    "migration": {"pgsize": 4096},
}
NUMBERS: Final = struct.pack("=HH", 0, 2)


def _text(data: bytes) -> bytes:
    """A VERSION with this in the place of its JSON."""
    return message(Command.VERSION, NUMBERS + data)


@section.check(MUST)
async def reply(server: Server) -> None:
    """The reply has major and minor version, and JSON that ends with a NUL."""
    async with server.connect() as peer:
        answer = await peer.propose()
        expect(not answer.refused and len(answer.payload) >= 4, "a reply of at least 4 bytes", answer)
        announced(answer.payload)


@section.check(MUST)
async def major(server: Server) -> None:
    """The major version in the reply is the one proposed."""
    async with server.connect() as peer:
        got = struct.unpack_from("=HH", (await peer.negotiate()).payload)
        expect(got[0] == 0, "major version 0", got[0])


@section.check(MUST)
async def minor(server: Server) -> None:
    """The minor version in the reply is at most the one proposed, and lower ones are supported too."""
    for proposed in (0, 1, 2, 65535):
        async with server.connect() as peer:
            got = struct.unpack_from("=HH", (await peer.negotiate(minor=proposed)).payload)
            expect(got[1] <= proposed, f"a minor version of at most {proposed}", got[1])


@section.check(MUST)
async def other_major(server: Server) -> None:
    """A major version that the server does not have ends the connection."""
    async with server.connect() as peer:
        await peer.turned_down(message(Command.VERSION, version(CAPABILITIES, major=77)), what="version 77.0")
        end = await _ending(peer)
        expect(end, "a closed connection", "an answer to DEVICE_GET_INFO")


@section.check(MUST)
async def first(server: Server) -> None:
    """VERSION is a client's first message: nothing else is granted before."""
    async with server.connect() as peer:
        asked = message(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size).encode())
        await peer.turned_down(asked, what="DEVICE_GET_INFO before VERSION")


@section.check(SHOULD)
async def once(server: Server) -> None:
    """VERSION comes once in a session: a second one changes nothing."""
    async with server.session() as peer:
        await peer.turned_down(message(Command.VERSION, version(CAPABILITIES)), what="a second VERSION")


@section.check(MUST)
async def no_data(server: Server) -> None:
    """The version data are optional."""
    async with server.session(None) as peer:
        await peer.quiet("VERSION without data")


@section.check(MUST)
async def no_capabilities(server: Server) -> None:
    """The object of capabilities is optional, and so is each of them."""
    for text in (b"{}\0", b'{"capabilities":{}}\0'):
        async with server.connect() as peer:
            answer = await peer.ask(Command.VERSION, NUMBERS + text)
            expect(not answer.refused, f"that VERSION with {text!r} is agreed to", answer)


@section.check(SHOULD)
async def unknown_keys(server: Server) -> None:
    """Capabilities of later minor versions are ignored by who does not know them."""
    async with server.session({**CAPABILITIES, "teleport": {"range": [1, 2]}}) as peer:
        expect("teleport" not in peer.announced, "no capability 'teleport'", peer.announced)


@section.check(MUST)
async def subset(server: Server) -> None:
    """The capabilities of the reply are among those proposed."""
    async with server.session() as peer:
        extra = sorted(set(peer.announced) - set(CAPABILITIES))
        expect(not extra, f"nothing but {sorted(CAPABILITIES)}", extra)


@section.check(MUST)
async def subset_of_none(server: Server) -> None:
    """To a client that proposes no capability, none is told."""
    async with server.session({}) as peer:
        expect(not peer.announced, "no capabilities", sorted(peer.announced))


@section.check(MUST)
async def kinds(server: Server) -> None:
    """Capabilities are of the kinds that the specification gives them."""
    async with server.session(EVERYTHING) as peer:
        for name in ("max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes"):
            value = peer.announced.get(name, 0)
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            expect(good, f"{name} as a number", repr(value))
        multiple = peer.announced.get("write_multiple", False)
        expect(isinstance(multiple, bool), "write_multiple as a boolean", repr(multiple))
        twin = peer.announced.get("twin_socket", {})
        expect(isinstance(twin, dict), "twin_socket as an object", repr(twin))


@section.check(EXTENSION)
async def limits_of_known_clients(server: Server) -> None:
    """No limit is told that QEMU refuses: more than 16 descriptors, or 64 MiB in a transfer."""
    async with server.session(EVERYTHING) as peer:
        fds = peer.limit("max_msg_fds", 1)
        expect(fds <= MAX_MSG_FDS, f"at most {MAX_MSG_FDS} descriptors", fds)
        size = peer.limit("max_data_xfer_size", 1 << 20)
        expect(0 < size <= MAX_DATA_XFER_SIZE, f"1 to {MAX_DATA_XFER_SIZE} bytes", size)


@section.check(MUST)
async def smaller_limits(server: Server) -> None:
    """Numbers of a client that are smaller than the server's are agreed to."""
    small = {"max_msg_fds": 1, "max_data_xfer_size": 4096, "max_dma_maps": 1, "pgsizes": 4096}
    async with server.session(small) as peer:
        await peer.quiet("VERSION")


@section.check(EXTENSION)
async def larger_limits(server: Server) -> None:
    """Numbers of a client that are larger than any server's are agreed to."""
    large = {"max_msg_fds": 1 << 20, "max_data_xfer_size": 1 << 30, "max_dma_maps": (1 << 31) - 1}
    async with server.session(large) as peer:
        await peer.quiet("VERSION")


@section.check(SHOULD)
async def no_json(server: Server) -> None:
    """Version data that are no JSON are not taken for good."""
    for text in (b"{\0", b"max_msg_fds=1\0", b"\xff\xfe\xfd\0", b"[" * 3000 + b"\0"):
        async with server.connect() as peer:
            await peer.turned_down(_text(text), what=f"version data {text[:16]!r}")


@section.check(SHOULD)
async def no_nul(server: Server) -> None:
    """Version data without their NUL are not taken for good."""
    async with server.connect() as peer:
        data = json.dumps({"capabilities": CAPABILITIES}).encode()
        await peer.turned_down(_text(data), what="version data without a NUL")


@section.check(SHOULD)
async def wrong_kind(server: Server) -> None:
    """A capability of the wrong kind is not taken for good."""
    values: tuple[Any, ...] = ("many", [], {}, -1)
    for value in values:
        async with server.connect() as peer:
            asked = message(Command.VERSION, version({**CAPABILITIES, "max_msg_fds": value}))
            await peer.turned_down(asked, what=f"max_msg_fds {value!r}")


@section.check(SHOULD)
async def truncated(server: Server) -> None:
    """A VERSION too short for its numbers is not taken for good."""
    for size in (0, 1, 3):
        async with server.connect() as peer:
            asked = message(Command.VERSION, NUMBERS[:size])
            await peer.turned_down(asked, what=f"VERSION of {size} bytes")


@section.check(SHOULD)
async def endless(server: Server) -> None:
    """A VERSION of 1 MiB does not end the server."""
    async with server.connect() as peer:
        with suppress(Failed):
            await peer.send(_text(b" " * (1 << 20) + b"{}\0"))
    await server.serves_on("a VERSION of 1 MiB")


@section.check(MUST)
async def in_pieces(server: Server) -> None:
    """A stream has no message boundaries: VERSION may come byte by byte."""
    async with server.connect() as peer:
        for byte in message(Command.VERSION, version(CAPABILITIES), message_id=9):
            await peer.send(bytes([byte]))
            await peer.settle()
        answer = await peer.reply_to(Command.VERSION, 9)
        expect(not answer.refused, "that VERSION is agreed to", answer)


@section.check(MUST)
async def message_id(server: Server) -> None:
    """The reply to VERSION has the id of the request, which may be any."""
    for number in (0, 1, 0xFFFF):
        async with server.connect() as peer:
            await peer.send(message(Command.VERSION, version(CAPABILITIES), message_id=number))
            await peer.reply_to(Command.VERSION, number)


@section.check(EXTENSION)
async def with_next(server: Server) -> None:
    """What is pipelined behind VERSION is not lost."""
    async with server.connect() as peer:
        asked = message(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size).encode(), message_id=2)
        await peer.send(message(Command.VERSION, version(CAPABILITIES), message_id=1) + asked)
        await peer.reply_to(Command.VERSION, 1)
        answer = await peer.reply_to(Command.DEVICE_GET_INFO, 2)
        expect(not answer.refused, "that DEVICE_GET_INFO is granted", answer)


@section.check(EXTENSION)
async def no_reply(server: Server) -> None:
    """A VERSION that wants no reply makes no session, or one without a reply; the server lives."""
    async with server.connect() as peer:
        flags = HeaderFlags.NO_REPLY
        await peer.send(message(Command.VERSION, version(CAPABILITIES), flags=flags))
    await server.serves_on("a VERSION that wants no reply")


@section.check(MUST)
async def multiple_unasked(server: Server) -> None:
    """`write_multiple` is not told to a client that did not propose it."""
    async with server.session() as peer:
        expect("write_multiple" not in peer.announced, "no write_multiple", peer.announced)


twin = Section("twin-socket", "VFIO_USER_VERSION, twin_socket")


@twin.check(MUST)
async def unasked(server: Server) -> None:
    """No twin socket is set up for a client that does not say that it supports one."""
    for proposed in (CAPABILITIES, {**CAPABILITIES, "twin_socket": {"supported": False}}):
        async with server.connect() as peer:
            answer = await peer.negotiate(proposed)
            told = peer.announced.get("twin_socket") or {}
            expect(not told.get("supported"), "twin_socket.supported not true", told)
            expect(not answer.fds, "no descriptors", len(answer.fds))


@twin.check(MUST)
async def index(server: Server) -> None:
    """Who sets up a twin socket gives its index among the descriptors of the reply."""
    async with server.connect() as peer:
        await peer.negotiate(TWIN)  # fails for an index that is none, and for what is no socket
        if not peer.has_twin:
            raise NotApplicable("the server sets up no twin socket")


@twin.check(MUST)
async def main_answers(server: Server) -> None:
    """With a twin socket, replies to the client's commands go on the main socket."""
    async with server.session(TWIN) as peer:
        if not peer.has_twin:
            raise NotApplicable("the server sets up no twin socket")
        await peer.quiet("VERSION")
        expect(not peer.asked, "no requests of the server without cause", peer.asked)


@twin.check(MUST)
async def no_descriptors(server: Server) -> None:
    """A client that takes no descriptors gets no twin socket."""
    async with server.connect() as peer:
        answer = await peer.negotiate({**TWIN, "max_msg_fds": 0})
        expect(not answer.fds, "no descriptors for a client with max_msg_fds 0", len(answer.fds))


async def _ending(peer: Peer) -> bool:
    """Whether the connection is closed: nothing more is answered."""
    try:
        asked = message(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size).encode())
        await peer.send(asked)
        return await peer.next("the end") is None
    except HungUp:
        return True
