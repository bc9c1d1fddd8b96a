"""A device that can be moved, on a scripted socket: the arcs and messages of the spec's migration written
with struct alone.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from errno import EINVAL, ENOTTY

from tests.client import peer as wire
from tests.client.peer import Message, Peer

ERROR, STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 0, 1, 2, 3, 4, 6
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
DIRECT = {
    (RUNNING, STOP),
    (STOP, RUNNING),
    (STOP_COPY, STOP),
    (RESUMING, STOP),
    (PRE_COPY, RUNNING),
    (RUNNING, PRE_COPY),
    (STOP, STOP_COPY),
    (PRE_COPY, STOP_COPY),
    (STOP, RESUMING),
}
INTERIOR = {STOP, RUNNING}
"""States that a longer way may lead through (not those of the saving group)."""


def way(start: int, end: int) -> list[int] | None:
    """The states after `start` on the shortest way to `end`."""
    ways: deque[list[int]] = deque([[start]])
    while ways:
        found = ways.popleft()
        if found[-1] == end:
            return found[1:]
        if len(found) > 1 and found[-1] not in INTERIOR:
            continue
        ways += [[*found, after] for before, after in sorted(DIRECT) if before == found[-1]]
        if len(found) > 6:
            return None
    return None


@dataclass
class FakeMover:
    """`ahead` are the passes of PRE_COPY, each as long as it is read; `rest` is read in STOP_COPY. `refuse`
    maps a state to the errno with which going there fails, `bad_byte` is where the incoming data is refused.
    """

    ahead: list[bytes] = field(default_factory=list)
    rest: bytes = b""
    flags: int = 5
    refuse: dict[int, int] = field(default_factory=dict)
    bad_byte: int | None = None
    deaf: set[int] = field(default_factory=set)
    """States to which a change is never answered."""
    state: int = RUNNING
    states: list[int] = field(default_factory=list)
    incoming: bytearray = field(default_factory=bytearray)
    resets: int = 0

    async def serve(self, peer: Peer) -> None:
        """Answer until the client leaves."""
        try:
            while True:
                self.answer(peer, await peer.next())
        except (EOFError, ConnectionResetError, BrokenPipeError):
            return

    def answer(self, peer: Peer, message: Message) -> None:
        """Answer one message."""
        match message.command:
            case wire.FEATURE:
                self._feature(peer, message)
            case wire.MIG_READ:
                argsz, size = struct.unpack("=II", message.payload)
                assert argsz == 8 + size
                data = self._read(size)
                peer.reply(message, struct.pack("=II", 8 + len(data), len(data)) + data)
            case wire.MIG_WRITE:
                argsz, size = struct.unpack_from("=II", message.payload)
                data = message.payload[8:]
                assert (argsz, size) == (8 + len(data), len(data))
                assert self.state == RESUMING
                self.incoming += data
                if self.bad_byte is not None and len(self.incoming) > self.bad_byte:
                    peer.refuse(message, EINVAL)
                else:
                    peer.reply(message)
            case wire.RESET:
                self.resets += 1
                self.state = RUNNING
                peer.reply(message)
            case _:
                raise AssertionError(message)

    def _read(self, size: int) -> bytes:
        assert self.state in (PRE_COPY, STOP_COPY)
        if self.state == STOP_COPY:
            data, self.rest = self.rest[:size], self.rest[size:]
            return data
        if not self.ahead:
            return b""
        data, self.ahead[0] = self.ahead[0][:size], self.ahead[0][size:]
        if len(data) < size:
            self.ahead.pop(0)
        return data

    def _feature(self, peer: Peer, message: Message) -> None:
        argsz, flags = struct.unpack_from("=II", message.payload)
        feature, method = flags & 0xFFFF, flags & ~0xFFFF
        if not self.flags or feature not in (1, 2):
            peer.refuse(message, ENOTTY)
        elif method & PROBE:
            peer.reply(message, message.payload)
        elif feature == 1:
            assert (argsz, method) == (16, GET)
            peer.reply(message, struct.pack("=IIQ", 16, flags, self.flags))
        elif method == GET:
            assert argsz == 16
            peer.reply(message, struct.pack("=IIII", 16, flags, self.state, 0))
        else:
            (wanted, fd) = struct.unpack_from("=II", message.payload, 8)
            assert fd == 0
            self._go(peer, message, wanted)

    def _go(self, peer: Peer, message: Message, wanted: int) -> None:
        if wanted in self.deaf:
            return
        steps = way(self.state, wanted)
        if steps is None or wanted in self.refuse:
            peer.refuse(message, self.refuse.get(wanted, EINVAL))
            return
        for step in steps:
            self.state = step
            self.states.append(step)
        peer.reply(message, message.payload)
