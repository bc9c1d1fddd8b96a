"""What a server may answer to what was sent, from the specification's rules of framing alone.

Nothing here depends on when things happened: it compares all that was said with all that came back.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass
from enum import Enum
from errno import (
    E2BIG,
    EACCES,
    EBADF,
    EBUSY,
    EEXIST,
    EFAULT,
    EINVAL,
    EMFILE,
    EMSGSIZE,
    ENODEV,
    ENOMEM,
    ENOSPC,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
    EPROTO,
)
from typing import Final

from fuzz._requests import HEADER_SIZE
from tests.server.raw import DMA_READ, DMA_WRITE, ERROR, NO_REPLY, REPLY, VERSION

LEGAL: Final = frozenset(
    {
        *(E2BIG, EACCES, EBADF, EBUSY, EEXIST, EFAULT, EINVAL, EMFILE, EMSGSIZE, ENODEV),
        *(ENOMEM, ENOSPC, ENOTTY, EOPNOTSUPP, EPERM, EPROTO),
    }
)
"""What a refusal may say. Not EIO: a mistake in the card's own code says that."""

MAX_DATA_XFER_SIZE: Final = 1 << 20
SURELY_TAKEN: Final = HEADER_SIZE + 16 + MAX_DATA_XFER_SIZE
SURELY_FATAL: Final = HEADER_SIZE + 64 + MAX_DATA_XFER_SIZE
"""Bytes of a message: up to the one it must be answered, from the other on it must be the end."""

MAX_MSG_FDS: Final = 16
"""Descriptors beyond, in one message, are refused, or the end: it depends on how the stream is cut."""


SHOWN: Final = 40
"""Messages at the end of either side's that a verdict shows."""


class VerdictError(AssertionError):
    """The server did what it may not do."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message as it was sent or came."""

    message_id: int
    command: int
    size: int
    flags: int
    error: int
    payload: bytes

    @property
    def kind(self) -> int:
        """0: a command, 1: a reply."""
        return self.flags & 0xF

    def answers(self, asked: Message) -> bool:
        """Whether it may be the answer to that."""
        return (self.message_id, self.command) == (asked.message_id, asked.command)

    def __str__(self) -> str:
        return f"{self.command}/{self.message_id} size={self.size} flags={self.flags:#x} error={self.error}"


def cut(stream: bytes) -> tuple[list[Message], bytes]:
    """The whole messages of a byte stream, and what follows them: half a message, or one that cannot be."""
    found = []
    at = 0
    while len(stream) - at >= HEADER_SIZE:
        message_id, command, size, flags, error = struct.unpack_from("=HHIII", stream, at)
        if not HEADER_SIZE <= size <= len(stream) - at:
            break
        payload = stream[at + HEADER_SIZE : at + size]
        found.append(Message(message_id, command, size, flags, error, payload))
        at += size
    return found, stream[at:]


class Expect(Enum):
    """What a message brings about."""

    ANSWER = "one answer"
    SILENCE = "no answer"
    MAYBE = "an answer, or the end"
    PERHAPS_NOTHING = "no answer, or the end"
    END = "the end, with or without a farewell"


class Judge:
    """Hears all that is said on one connection, and says at the end whether it was right."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._heard = bytearray()
        self._fds: list[tuple[int, int]] = []
        self.dropped = False
        """Set when the client gave a reason to be dropped that its bytes do not show: it took no answers."""

    def said(self, data: bytes, fds: int) -> None:
        """The client sent this."""
        if fds:
            self._fds.append((len(self._said), fds))
        self._said += data

    def heard(self, data: bytes) -> None:
        """The server sent this."""
        self._heard += data

    @property
    def begun(self) -> bool:
        """Whether the server has said anything."""
        return bool(self._heard)

    @property
    def at_boundary(self) -> bool:
        """Whether the client has not begun a message that it has not finished."""
        return not cut(bytes(self._said))[1]

    def judge(self) -> int:
        """The number of messages that were exchanged; raises VerdictError.

        To be called when the server has hung up, because the client did or because it was the end.
        """
        try:
            return self._judge()
        except VerdictError as verdict:
            for name, stream in (("said", self._said), ("heard", self._heard)):
                messages, rest = cut(bytes(stream))
                shown = (f"{name}:", *map(str, messages[-SHOWN:]), f"and {len(rest)} bytes")
                verdict.add_note("\n".join(shown))
            raise

    def _judge(self) -> int:
        said, rest = cut(bytes(self._said))
        heard, half = cut(bytes(self._heard))
        if half and not self.dropped:
            raise VerdictError(f"the server stopped within a message: {half[:64]!r}")
        asked = [message for message in heard if message.kind == 0]
        for message in asked:
            if message.command not in (DMA_READ, DMA_WRITE) or message.flags:
                raise VerdictError(f"the server asked {message}")
        answers = deque(message for message in heard if message.kind)
        agreed, may_end, end = False, self.dropped, 0
        for number, message in enumerate(said):
            start, end = end, end + message.size
            if sum(fds for at, fds in self._fds if start <= at < end) > MAX_MSG_FDS:
                may_end = True
            expect = self._expect(message, agreed, bool(asked))
            if expect is Expect.END:
                return self._the_end(answers, message, number)
            may_end |= expect in (Expect.MAYBE, Expect.PERHAPS_NOTHING)
            if expect in (Expect.SILENCE, Expect.PERHAPS_NOTHING):
                continue
            if may_end and not answers:
                return number
            if may_end and len(answers) == 1 and answers[0].flags & ERROR and not answers[0].answers(message):
                return number  # a farewell
            if not answers or not answers[0].answers(message):
                what = answers[0] if answers else "nothing"
                raise VerdictError(f"{what} answers {message}, the {number}. of {len(said)} messages")
            answer = answers.popleft()
            self._check(message, answer)
            if not agreed:
                agreed = not answer.flags & ERROR
                may_end = self.dropped
        if answers and not (len(rest) >= HEADER_SIZE and len(answers) == 1):
            raise VerdictError(f"{answers[0]} answers nothing")
        return len(said)

    @staticmethod
    def _expect(message: Message, agreed: bool, asked: bool) -> Expect:
        if message.kind > 1 or message.size >= SURELY_FATAL:
            return Expect.END
        if message.kind == 1:
            return Expect.PERHAPS_NOTHING if asked and agreed else Expect.END
        silent = message.flags & NO_REPLY
        if not agreed:
            proposes = message.command == VERSION and not message.flags & (NO_REPLY | ERROR)
            return Expect.MAYBE if proposes else Expect.END
        if message.size > SURELY_TAKEN:
            return Expect.PERHAPS_NOTHING if silent else Expect.MAYBE
        return Expect.SILENCE if silent else Expect.ANSWER

    @staticmethod
    def _the_end(answers: deque[Message], message: Message, number: int) -> int:
        if answers and answers[0].answers(message) and answers[0].flags & ERROR:
            answers.popleft()
        if answers:
            raise VerdictError(f"{answers[0]} after {message}, which is the end")
        return number

    @staticmethod
    def _check(message: Message, answer: Message) -> None:
        if answer.flags == REPLY:
            if answer.error:
                raise VerdictError(f"{answer}: an errno without an error")
        elif answer.flags == REPLY | ERROR:
            if answer.error not in LEGAL:
                raise VerdictError(f"{answer} to {message}: a strange errno")
            if answer.payload:
                raise VerdictError(f"{answer}: a refusal with a payload")
        else:
            raise VerdictError(f"{answer}: strange flags")
