"""A client in a thread of its own, for servers whose trio thread waits for it: it answers DMA messages."""

import json
import os
import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.server.raw import DMA_READ, DMA_WRITE, ERROR, REPLY, Message, message, version

PATIENCE_S = 5


class Link:
    """One of its sockets: messages in, bytes out in pieces of any length."""

    def __init__(self, connected: socket.socket, chance: random.Random) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.out = bytearray()
        self._chance = chance
        self._came = b""
        self._fds: list[int] = []

    def push(self) -> None:
        """Send some of what waits."""
        if self.out:
            try:
                sent = self.socket.send(self.out[: self._chance.choice([1, 7, 16, 40, 300, 1 << 16])])
            except BlockingIOError:
                return
            del self.out[:sent]

    def pull(self) -> Iterator[Message]:
        """What is complete of what has come; EOFError if the server hung up."""
        try:
            data, fds, _, _ = socket.recv_fds(self.socket, self._chance.choice([3, 16, 100, 1 << 16]), 64)
        except BlockingIOError:
            return
        if not data:
            raise EOFError
        self._came += data
        self._fds += fds
        while len(self._came) >= 16:
            message_id, command, size, flags, error = struct.unpack_from("=HHIII", self._came)
            if len(self._came) < size:
                return
            payload, self._came = self._came[16:size], self._came[size:]
            fds, self._fds = self._fds, []
            yield Message(message_id, command, size, flags, error, payload, fds)


class Guest:
    """``memory`` from IOVA 0 on is answered for; ``twin``: ask for a socket of the server's own.

    Call everything in one thread that is not the server's.
    """

    def __init__(self, connected: socket.socket, *, twin: bool = False, seed: int = 0) -> None:
        self.chance = random.Random(seed)
        self.memory = bytearray(1 << 12)
        self.main = Link(connected, self.chance)
        self.replies: list[Message] = []
        self.asked: list[Message] = []
        self._owed: list[tuple[Link, bytes]] = []
        self.main.out += version(
            {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20, "twin_socket": {"supported": twin}}
        )
        self.links = [self.main]
        self.until(lambda: bool(self.replies))
        agreed = self.replies.pop()
        self.agreed: dict[str, Any] = json.loads(agreed.payload[4:-1])["capabilities"]
        if agreed.fds:
            self.links.append(Link(socket.socket(fileno=agreed.fds.pop()), self.chance))
        assert not agreed.fds

    @property
    def owes(self) -> bool:
        """Whether there are answers that are not on their way yet."""
        return bool(self._owed)

    def close(self) -> None:
        """Hang up."""
        for link in self.links:
            link.socket.close()

    def until(self, satisfied: Callable[[], bool]) -> None:
        """Send, answer and receive in any order until it is as wished."""
        while not satisfied():
            self._step()

    def _step(self) -> None:
        idle = not self._owed and not any(link.out for link in self.links)
        if self._owed and (self.chance.random() < 0.5 or not self._readable(0)):
            link, answer = self._owed.pop(self.chance.randrange(len(self._owed)))
            link.out += answer
        for link in self.links:
            if self.chance.random() < 0.7:
                link.push()
        if self._readable(PATIENCE_S if idle else 0):
            for link in self.links:
                for got in link.pull():
                    self._take(link, got)
        else:
            assert not idle, "the server says nothing"

    def _readable(self, seconds: float) -> bool:
        return bool(select.select([link.socket for link in self.links], [], [], seconds)[0])

    def _take(self, link: Link, got: Message) -> None:
        if got.flags & REPLY:
            self.replies.append(got)
            return
        assert got.command in (DMA_READ, DMA_WRITE)
        assert link is self.links[-1], "with a second socket the server asks there"
        self.asked.append(got)
        address, count = got.unpack("QQ")
        head = got.payload[:16]
        if got.command == DMA_WRITE:
            assert len(got.payload) == 16 + count
            self.memory[address : address + count] = got.payload[16:]
        else:
            head += self.memory[address : address + count]
        self._owed.append((link, message(got.command, head, message_id=got.message_id, flags=REPLY)))

    def ask(self, command: int, payload: bytes = b"") -> Message:
        """A request and its reply."""
        self.main.out += message(command, payload)
        self.until(lambda: bool(self.replies))
        return self.replies.pop()

    def refused(self, command: int, payload: bytes = b"") -> int:
        """The errno of a request that must be refused."""
        reply = self.ask(command, payload)
        assert reply.flags & ERROR
        return reply.error


@contextmanager
def guest(path: Path, *, twin: bool = False, seed: int = 0) -> Iterator[Guest]:
    """A guest of the server that listens at ``path``."""
    with socket.socket(socket.AF_UNIX) as connecting:
        connecting.settimeout(PATIENCE_S)
        connecting.connect(os.fspath(path))
        made = Guest(connecting, twin=twin, seed=seed)
        try:
            yield made
        finally:
            made.close()
