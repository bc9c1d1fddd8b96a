"""Ways in which a server may be wrong, each a class for the proxy."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from tests.conformance.proxy import NO_REPLY, REPLY, Hangup, Honest, Message

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, IO_FDS, IRQ_INFO, SET_IRQS = range(1, 9)
READ, WRITE, DMA_READ, DMA_WRITE, RESET = range(9, 14)
WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE = range(15, 19)
EIO = 5


class Refusing(Honest):
    """Refuses some commands, which the server never sees."""

    commands: ClassVar[tuple[int, ...]] = ()

    def request(self, message: Message) -> Message | None:
        return None if message.command in self.commands else message

    def instead(self, message: Message) -> Sequence[Message]:
        return () if message.flags & NO_REPLY else (message.refusal(EIO),)


class Granting(Honest):
    """Grants what was refused: the payload of the request again, and no descriptors."""

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (asked.granted(asked.payload),) if reply.is_refusal else (reply,)


class Changing(Honest):
    """Changes the payload of replies that grant some commands."""

    commands: ClassVar[tuple[int, ...]] = ()

    def change(self, payload: bytes) -> bytes:
        raise NotImplementedError

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        if asked.command in self.commands and not reply.is_refusal:
            return (replace(reply, payload=self.change(reply.payload)),)
        return (reply,)


class Swallowing(Honest):
    """Grants some requests and does nothing."""

    def swallows(self, message: Message) -> bool:
        raise NotImplementedError

    def request(self, message: Message) -> Message | None:
        return None if self.swallows(message) else message

    def instead(self, message: Message) -> Sequence[Message]:
        payload = message.payload[:24] if message.command == DMA_UNMAP else b""
        if message.command == WRITE:
            payload = message.payload[:16]
        return () if message.flags & NO_REPLY else (message.granted(payload),)


class Bashful(Swallowing):
    """Takes a mask for the tests by TRIGGER too: grants them, and does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.masked = False

    def swallows(self, message: Message) -> bool:
        if message.command != SET_IRQS:
            return False
        flags = int.from_bytes(message.payload[4:8], "little")
        if flags & 0x18:  # MASK, UNMASK
            self.masked = bool(flags & 0x8)
        return self.masked and flags == 0x21  # DATA_NONE, TRIGGER


def refusing(*commands: int) -> type[Honest]:
    return type("Refusing", (Refusing,), {"commands": commands})


def changing(change: Callable[[bytes], bytes], *commands: int) -> type[Honest]:
    return type("Changing", (Changing,), {"commands": commands, "change": staticmethod(change)})


def swallowing(swallows: Callable[[Message], bool]) -> type[Honest]:
    return type("Swallowing", (Swallowing,), {"swallows": staticmethod(swallows)})


def longer(payload: bytes) -> bytes:
    return payload + bytes(4)


def word(position: int, value: int, size: int = 4) -> Callable[[bytes], bytes]:
    """Puts a number in a reply's payload, if it is that long."""

    def change(payload: bytes) -> bytes:
        if len(payload) < position + size:
            return payload
        return payload[:position] + value.to_bytes(size, "little") + payload[position + size :]

    return change


def turn(position: int) -> Callable[[bytes], bytes]:
    """Turns a bit of a byte."""

    def change(payload: bytes) -> bytes:
        if len(payload) <= position:
            return payload
        return payload[:position] + bytes([payload[position] ^ 1]) + payload[position + 1 :]

    return change


class WrongIds(Honest):
    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (reply if reply.command == VERSION and reply.id > 1 else replace(reply, id=reply.id ^ 1),)


class IdsOnce(Honest):
    """Believes that an id is used once."""

    def begin(self) -> None:
        self.seen: set[int] = set()

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        known = asked.id in self.seen
        self.seen.add(asked.id)
        return (asked.refusal(EIO),) if known else (reply,)


class AsCommand(Honest):
    """Refuses with messages of type command, as older servers of rust-vmm do."""

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, flags=reply.flags & ~REPLY),) if reply.is_refusal else (reply,)


class ErrorWithPayload(Honest):
    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, payload=asked.payload or b"why"),) if reply.is_refusal else (reply,)


class StrangeErrno(Honest):
    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, error=0xFFFFFFEA),) if reply.is_refusal else (reply,)


class OtherErrno(Honest):
    """EINVAL for everything, as libvfio-user."""

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, error=22),) if reply.is_refusal else (reply,)


class StrangeFlags(Honest):
    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, flags=reply.flags | 0x80),)


class AnswersPosted(Honest):
    def unanswered(self, message: Message) -> Sequence[Message]:
        return (message.granted(),)


class Reversing(Honest):
    """Answers the later of two requests first."""

    def begin(self) -> None:
        self.waiting = 0
        self.held: list[Message] = []

    def request(self, message: Message) -> Message | None:
        self.waiting += not message.flags & NO_REPLY
        return message

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        self.waiting -= 1
        if self.waiting and not self.held:
            self.held = [reply]
            return ()
        answers, self.held = [reply, *self.held], []
        return answers


class Whole(Honest):
    """Takes nothing but whole messages, as libvfio-user takes headers."""

    def chunk(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if len(data) - at < 16:
                raise Hangup
            size = struct.unpack_from("=I", data, at + 4)[0]
            if size < 16 or at + size > len(data):
                raise Hangup
            at += size


class Single(Honest):
    """Takes one message at a time out of a piece, and cannot do with more."""

    def chunk(self, data: bytes) -> None:
        if len(data) > 16 and struct.unpack_from("=I", data, 4)[0] < len(data):
            raise Hangup


class LosesDescriptors(Honest):
    def request(self, message: Message) -> Message | None:
        return replace(message, fds=())


class Deaf(Honest):
    deaf_after_client = True


class Fragile(Honest):
    """Serves nobody any more after bytes that are not one whole message of type command."""

    def begin(self) -> None:
        self.deaf_after_client = True  # until a client said something that is right

    def chunk(self, data: bytes) -> None:
        size, flags = struct.unpack_from("=II", data, 4) if len(data) >= 16 else (0, 0)
        self.deaf_after_client = size != len(data) or flags & 0x1F != 0


class Jealous(Honest):
    jealous = True


class Hoarding(Honest):
    """Keeps every descriptor."""

    def request(self, message: Message) -> Message | None:
        self.kept += [os.dup(fd) for fd in message.fds]
        return message


class Mapping(Honest):
    """Keeps every window mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[mmap.mmap] = []

    def request(self, message: Message) -> Message | None:
        if message.command == DMA_MAP and message.fds:
            with contextlib.suppress(OSError, ValueError):
                self.maps.append(mmap.mmap(message.fds[0], 4096))
        return message

    def close(self) -> None:
        for each in self.maps:
            each.close()
        super().close()


class SelfishMemory(Honest):
    """Remembers windows from one client to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.windows: set[bytes] = set()

    def begin(self) -> None:
        self.before = set(self.windows)

    def request(self, message: Message) -> Message | None:
        if message.command == DMA_MAP:
            if message.payload[16:24] in self.before:
                return None
            self.windows.add(message.payload[16:24])
        return message

    def instead(self, message: Message) -> Sequence[Message]:
        return (message.refusal(17),)


class Ghost(Honest):
    """Signals the eventfds of clients that left."""

    def request(self, message: Message) -> Message | None:
        if message.command == SET_IRQS:
            if message.fds:
                self.kept += [os.dup(fd) for fd in message.fds]
            else:
                for fd in self.kept:
                    with contextlib.suppress(OSError):
                        os.eventfd_write(fd, 1)
        return message


# VERSION


class Versions(Honest):
    """Changes the reply to VERSION; `capabilities` gets what was proposed and what was answered."""

    numbers: ClassVar[bytes | None] = None
    fds: ClassVar[bool] = False

    def capabilities(self, proposed: Any, answered: Any) -> Any:
        return answered

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        if asked.command != VERSION or reply.is_refusal:
            return (reply,)
        text = asked.payload[4:].rstrip(b"\0")
        proposed = json.loads(text).get("capabilities", {}) if text else {}
        answered = json.loads(reply.payload[4:-1])["capabilities"]
        changed = json.dumps({"capabilities": self.capabilities(proposed, answered)}).encode() + b"\0"
        reply = replace(reply, payload=(self.numbers or reply.payload[:4]) + changed)
        if self.fds:
            null = os.open("/dev/null", os.O_RDWR)
            self.kept.append(null)
            reply = replace(reply, fds=(null, *reply.fds))
        return (reply,)


def versions(change: Callable[[Any, Any], Any]) -> type[Honest]:
    return type("Versions", (Versions,), {"capabilities": lambda self, *told: change(*told)})


def adding(**capabilities: Any) -> type[Honest]:
    return versions(lambda proposed, answered: {**answered, **capabilities})


class OtherMajor(Versions):
    numbers = struct.pack("=HH", 1, 0)


class OtherMinor(Versions):
    numbers = struct.pack("=HH", 0, 3)


class StrayDescriptor(Versions):
    fds = True


class NoNul(Honest):
    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, payload=reply.payload[:-1]) if asked.command == VERSION else reply,)


class VersionId(Honest):
    """Numbers its answer to VERSION itself."""

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, id=1) if asked.command == VERSION else reply,)


class ShyOfTwins(Honest):
    """Falls silent on the main socket once there is a twin."""

    def begin(self) -> None:
        self.twin = False

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        self.twin |= b"fd_index" in reply.payload
        return () if self.twin and asked.command != VERSION else (reply,)


def particular(wrong: Callable[[Message], bool], errno: int | None = EIO) -> type[Honest]:
    """Refuses what is not wrong, or does not answer it at all."""

    def request(self: Honest, message: Message) -> Message | None:
        return None if wrong(message) else message

    def instead(self: Honest, message: Message) -> Sequence[Message]:
        return () if errno is None else (message.refusal(errno),)

    return type("Particular", (Honest,), {"request": request, "instead": instead})


def version_of(message: Message) -> Any:
    """What VERSION proposes; None for other messages, and for none."""
    if message.command != VERSION or len(message.payload) < 5:
        return None
    try:
        document = json.loads(message.payload[4:].rstrip(b"\0"))
    except (ValueError, RecursionError):
        return None
    return document.get("capabilities", {}) if isinstance(document, dict) else None


class Restless(Honest):
    """Says something else each time."""

    def begin(self) -> None:
        self.times = 0

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        self.times += 1
        if asked.command in (GET_INFO, REGION_INFO) and not reply.is_refusal:
            return (replace(reply, payload=word(16, self.times)(word(12, self.times)(reply.payload))),)
        return (reply,)


class Shallow(Honest):
    """Bears no more than a few requests at a time."""

    def begin(self) -> None:
        self.waiting = 0

    def request(self, message: Message) -> Message | None:
        self.waiting += 1
        if self.waiting > 40:
            raise Hangup
        return message


class ShortFiles(Honest):
    """Cannot bear a file that ends within its window."""

    def request(self, message: Message) -> Message | None:
        if message.command == DMA_MAP and message.fds and len(message.payload) == 32:
            length = int.from_bytes(message.payload[24:32], "little")
            if os.fstat(message.fds[0]).st_size < min(length, 1 << 40):
                raise Hangup
        return message


# DMA by message


def questions(change: Callable[[Message], Message | None]) -> type[Honest]:
    return type("Questions", (Honest,), {"question": lambda self, question: change(question)})


class OtherTwin(Versions):
    """Gives the client a twin socket, and uses the main one."""

    def request(self, message: Message) -> Message | None:
        proposed = version_of(message)
        if not proposed:
            return message
        proposed = {name: value for name, value in proposed.items() if name != "twin_socket"}
        text = json.dumps({"capabilities": proposed}).encode() + b"\0"
        return replace(message, payload=message.payload[:4] + text)

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        proposed = version_of(asked)
        if not proposed or "twin_socket" not in proposed or reply.is_refusal:
            return (reply,)
        ours, theirs = (each.detach() for each in socket.socketpair())
        self.kept += [ours, theirs]
        capabilities = {**json.loads(reply.payload[4:-1])["capabilities"]}
        capabilities["twin_socket"] = {"supported": True, "fd_index": 0}
        text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
        return (replace(reply, payload=reply.payload[:4] + text, fds=(theirs,)),)


class Forsaken(Honest):
    """Serves nobody any more after a question that was not answered."""

    def begin(self) -> None:
        self.deaf_after_client = False

    def question(self, question: Message) -> Message | None:
        self.deaf_after_client = True
        return question

    def request(self, message: Message) -> Message | None:
        if message.flags & REPLY:
            self.deaf_after_client = False
        return message


class Sulking(Honest):
    """Hangs up on a client that refuses it something."""

    def request(self, message: Message) -> Message | None:
        if message.flags & REPLY and message.is_refusal:
            raise Hangup
        return message
