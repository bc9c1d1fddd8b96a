"""Ways in which a server may be wrong about exports of BARs, each a class for the proxy."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import replace

from tests.conformance.mutations import EIO, FEATURE, WRITE
from tests.conformance.proxy import Honest, Message


class KeepsExports(Honest):
    """Sends no descriptor with a feature."""

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        return (replace(reply, fds=()) if asked.command == FEATURE else reply,)


class ExportsNothing(Honest):
    """Exports a file that has nothing to do with the BAR, and is as long."""

    def reply(self, asked: Message, reply: Message) -> Sequence[Message]:
        if asked.command != FEATURE or not reply.fds:
            return (reply,)
        other = os.memfd_create("other", os.MFD_CLOEXEC)
        os.ftruncate(other, os.fstat(reply.fds[0]).st_size)
        os.pwrite(other, b"something else", 0)
        self.kept.append(other)
        return (replace(reply, fds=(other,)),)


class AsleepExports(Honest):
    """Exports nothing once configuration space was written with memory decoding off."""

    def begin(self) -> None:
        self.off = False

    def request(self, message: Message) -> Message | None:
        if message.command == WRITE and message.payload[:12] == struct.pack("=QI", 4, 7):
            self.off = not message.payload[16] & 2
        return None if self.off and message.command == FEATURE else message

    def instead(self, message: Message) -> Sequence[Message]:
        return (message.refusal(EIO),)
