"""Memory that a check shares with the server, and what of it the server reaches by message."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Final, Self

from conformance._messages import Message, message
from protocol import Command
from protocol.messages import DmaAccess, HeaderFlags
from protocol.vfio import DmaMapFlags

PAGE: Final = 4096
"""The one page size that every server takes (spec, `pgsizes`)."""

IOVA: Final = 0x100_0000
"""Where windows of checks begin: anywhere will do, but not at 0, which a server could take for none."""


class Memory:
    """A memfd whose seals tell whether somebody has it mapped. A context manager; bytes are zero at first."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.fd = os.memfd_create("conformance", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.fd)

    def read(self, offset: int, count: int) -> bytes:
        """Its bytes."""
        return os.pread(self.fd, count, offset)

    def write(self, offset: int, data: bytes) -> None:
        """Change its bytes."""
        os.pwrite(self.fd, data, offset)

    def seal(self) -> bool:
        """Forbid writing for ever; False while anybody has it mapped (memfd_create(2), F_SEAL_WRITE)."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True


@dataclass(frozen=True, slots=True)
class Window:
    """A DMA window: `length` bytes at the IOVA `address`, `offset` bytes into the memory."""

    address: int
    length: int
    memory: Memory
    offset: int
    flags: DmaMapFlags

    def covers(self, address: int, count: int, flag: DmaMapFlags) -> bool:
        """All of these bytes lie here and may be accessed so."""
        inside = self.address <= address and address + count <= self.address + self.length
        return inside and flag in self.flags


def answer_dma(windows: Sequence[Window], question: Message) -> bytes:
    """The reply to a DMA_READ or DMA_WRITE: done where a window covers it, else a refusal."""
    reading = question.command == Command.DMA_READ
    answer = partial(message, question.command, message_id=question.message_id)
    refusal = answer(flags=HeaderFlags.REPLY | HeaderFlags.ERROR, error=errno.EFAULT)
    if len(question.payload) < DmaAccess.size:
        return refusal
    asked = DmaAccess.decode(question.payload)
    data = question.payload[DmaAccess.size :]
    flag = DmaMapFlags.READ if reading else DmaMapFlags.WRITE
    window = next((each for each in windows if each.covers(asked.address, asked.count, flag)), None)
    if window is None or len(data) != (0 if reading else asked.count):
        return refusal
    at = asked.address - window.address + window.offset
    if reading:
        data = window.memory.read(at, asked.count)
    else:
        window.memory.write(at, data)
    return answer(asked.encode() + (data if reading else b""), flags=HeaderFlags.REPLY)
