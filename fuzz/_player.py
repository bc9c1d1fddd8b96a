"""A client that plays a script: `Choices` decide what it does, a judge is told what comes back."""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import stat
import struct
from collections.abc import Callable
from typing import Final

from fuzz._choices import PAGE, Choices
from fuzz._driver import doorbell, furnish, life, live_migration, scribble
from fuzz._house import PATIENCE, HangError, House
from fuzz._judge import Judge, cut
from fuzz._requests import FEATURE, HEADER_SIZE, MIG_READ, MIG_WRITE, Sent, proposal, request
from fuzz._zoo import MEMORY_PAGES, Zoo
from tests.server.raw import (
    CAPABILITIES,
    CONFIG,
    DMA_MAP,
    DMA_READ,
    ERROR,
    EVENTFD,
    MSIX,
    NO_REPLY,
    REGION_WRITE,
    REPLY,
    SET_IRQS,
    TRIGGER,
    access,
    dma,
    irqs,
    message,
    version,
)

STOPPED, RUNNING, STOP_COPY, RESUMING, _, PRE_COPY = range(1, 7)
"""States of migration, by the specification's numbers."""

MIG_STATE: Final = 2
SET: Final = 1 << 17
MIG_HEAD: Final = 8
MAX_STREAM: Final = 1 << 18

SOON: Final = 0.002
"""Seconds in which a card asks for memory, if it does at all."""

SEND_DEADLINE: Final = 31.0
VERSION_DEADLINE: Final = 11.0
"""Seconds: a little more than the server bears."""


class Player:
    """One connection to `house`."""

    def __init__(self, house: House, zoo: Zoo) -> None:
        self.house = house
        self.zoo = zoo
        self.judge = Judge()
        self._socket = house.connect()
        self._socket.setblocking(False)
        self._twin: socket.socket | None = None
        self._ended = False
        self._unheard = b""
        self._twin_unheard = b""
        self._stream = b""

    def close(self) -> None:
        """Hang up without waiting for anything."""
        self._socket.close()
        if self._twin is not None:
            self._twin.close()
            self._twin = None

    def finish(self) -> int:
        """Say that nothing more will come, hear all answers; the number of messages exchanged.

        Raises VerdictError, HangError.
        """
        try:
            if self.judge.at_boundary:
                self.send(Sent(message(REGION_WRITE, access(0, CONFIG, 0), message_id=0xFFFF)))
            if not self._ended:
                self._socket.shutdown(socket.SHUT_WR)
            while not self._ended:
                self._wait(select.POLLIN)
                self.hear()
        finally:
            self.close()
        return self.judge.judge()

    def step(self, choices: Choices) -> None:
        """One act."""
        choices.pick(_ACTS)(self, choices)

    # acts

    def propose(self, choices: Choices) -> None:
        """Say VERSION."""
        self.send(Sent(proposal(choices)))

    def begin(self, choices: Choices) -> None:
        """Say VERSION as every known client does."""
        said = dict(CAPABILITIES, write_multiple=True)
        if choices.byte() & 1:
            said["twin_socket"] = {"supported": True}
        self.send(Sent(version(said)))

    def begin_well(self, choices: Choices) -> None:
        """All that an honest client does until the driver runs; its memory is mapped or must be asked for."""
        self.begin(choices)
        fds = () if choices.byte() & 1 else (self.zoo.kinds["memory"],)
        self.send(Sent(message(DMA_MAP, dma(0, MEMORY_PAGES * PAGE)), fds))
        self.bring_up(Choices(b"\1"))

    def ask(self, choices: Choices) -> None:
        """A request in one piece."""
        self.send(request(choices, self.zoo))

    def ask_much(self, choices: Choices) -> None:
        """Several requests in one piece; descriptors go with the last."""
        several = [request(choices, self.zoo) for _ in range(2 + choices.below(6))]
        self.send(Sent(b"".join(sent.data for sent in several), several[-1].fds))

    def ask_in_pieces(self, choices: Choices) -> None:
        """A request that arrives bit by bit, its descriptors with the first."""
        sent = request(choices, self.zoo)
        fds = sent.fds
        at = 0
        for _ in range(1 + choices.below(4)):
            piece = sent.data[at : at + 1 + choices.below(len(sent.data))]
            if piece:
                self.send(Sent(piece, fds))
            at, fds = at + len(piece), ()
        if at < len(sent.data):
            self.send(Sent(sent.data[at:], fds))

    def babble(self, choices: Choices) -> None:
        """A message whose header is wrong, or any bytes."""
        if choices.byte() & 1:
            self.send(request(choices, self.zoo, framed=False))
        elif data := choices.bytes(1 + choices.below(64)):
            self.send(Sent(data, tuple(self.zoo.some(choices, "memory", choices.below(3)))))

    def converse(self, choices: Choices) -> None:
        """Offer chains, and answer what the card asks while it looks at them."""
        self.scribble(choices)
        for _ in range(1 + choices.below(8)):
            self.answer(choices)

    def answer(self, choices: Choices) -> None:
        """Answer what the server asked, or what it did not."""
        sources = [self._socket] if self._twin is None else [self._socket, self._twin]
        if not self._ended:
            select.select(sources, [], [], SOON)
        self.hear()
        asked: list[bytes | None] = [*self._asked()]
        if choices.seldom():
            asked.append(None)
        for wanted in asked:
            data = self._answer(choices, wanted)
            if self._twin is not None and choices.often():
                self._say_on_twin(data)
            else:
                self.send(Sent(data))

    def abuse_twin(self, choices: Choices) -> None:
        """Say on the second socket what does not belong there, or hang up there alone."""
        self.hear()
        if self._twin is None or not choices.seldom():
            return
        self.judge.dropped = True
        match choices.below(4):
            case 0:
                self._twin.close()
                self._twin = None
            case 1:
                self._say_on_twin(choices.bytes(1 + choices.below(40)))
            case 2:
                sent = request(choices, self.zoo, framed=choices.often())
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent.fds))]
                with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                    self._twin.sendmsg([sent.data], rights if sent.fds else [], socket.MSG_NOSIGNAL)
            case _:
                self._say_on_twin(message(DMA_READ, bytes(16), message_id=choices.below(4), flags=REPLY) * 9)

    def map_memory(self, choices: Choices) -> None:
        """A window in which `bring_up` finds its rings, with memory behind it or by messages only."""
        fds = [self.zoo.kinds["memory"]] if choices.often() else []
        self.send(Sent(message(DMA_MAP, dma(0, MEMORY_PAGES * PAGE)), tuple(fds)))

    def bring_up(self, choices: Choices) -> None:
        """What a driver does until its queues run."""
        if choices.byte() & 1:
            fds = tuple(self.zoo.some(choices, "event", 4))
            self.send(Sent(message(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, 4)), fds))
        furnish(self.zoo.guest)
        self._write(CONFIG, 4, 2, 6)
        for write in life(choices, int(self.house.nic.offered_features())):
            self._write(0, *write)

    def use_block(self, choices: Choices) -> None:
        """Log, ring state and queues that stop, as a driver of the IFC VF has them."""
        for _ in range(1 + choices.below(4)):
            for each in live_migration(choices):
                self._write(*each)

    def scribble(self, choices: Choices) -> None:
        """Change the rings behind the card's back, then ring a doorbell."""
        self._write(0, *doorbell(scribble(choices, self.zoo.guest)))

    def save(self, choices: Choices) -> None:
        """Ask for the card's state, mostly in the right order."""
        for state in (*choices.pick(((STOP_COPY,), (PRE_COPY, STOP_COPY), (PRE_COPY,), (RUNNING,))),):
            self._enter(choices, state)
            for _ in range(choices.below(6)):
                size = choices.pick((65536, 4096, 100, 1))
                self.send(Sent(message(MIG_READ, struct.pack("=II", MIG_HEAD + size, size))))
        if choices.often():
            self._enter(choices, RUNNING)

    def load(self, choices: Choices) -> None:
        """Give the card a state: its own, mostly, with something wrong in it."""
        self.hear()
        self._asked()
        stream = bytearray(self._stream)
        for _ in range(choices.below(3)):
            if stream:
                stream[choices.below(len(stream))] ^= 1 << choices.below(8)
        if choices.seldom():
            del stream[choices.below(len(stream) + 1) :]
        self._enter(choices, RESUMING)
        step = choices.pick((65536, 1000, 32))
        for at in range(0, min(len(stream), 64 * step), step):
            piece = bytes(stream[at : at + step])
            payload = struct.pack("=II", MIG_HEAD + len(piece), len(piece)) + piece
            self.send(Sent(message(MIG_WRITE, payload)))
        self._enter(choices, STOPPED)
        self._enter(choices, RUNNING)

    def _enter(self, choices: Choices, state: int) -> None:
        state = state if choices.often() else choices.below(9)
        self.send(Sent(message(FEATURE, struct.pack("=IIII", 16, MIG_STATE | SET, state, 0))))

    def betray(self, choices: Choices) -> None:
        """Take memory away that may be mapped, or fill an eventfd."""
        if choices.byte() & 1:
            self.zoo.betray()
        else:
            event = self.zoo.kinds[choices.pick(("event", "blocking event"))]
            os.set_blocking(event, False)
            try:
                os.eventfd_write(event, (1 << 64) - 2)
            except BlockingIOError:
                return
            finally:
                os.set_blocking(event, True)

    def listen(self, choices: Choices) -> None:
        """Take what has come."""
        self.hear()

    def wait(self, choices: Choices) -> None:
        """Let so much time pass that a server loses its patience with one who said nothing yet."""
        self.hear()
        if not self.judge.begun:
            self.house.pass_time(VERSION_DEADLINE)
            self.judge.dropped = True

    def stop_reading(self, choices: Choices) -> None:
        """Ask for more and more without taking an answer, until the server does not bear it any longer."""
        if not (choices.seldom() and choices.seldom()):
            return
        flood = message(9, access(0, 2, PAGE), message_id=7) * 16
        self.judge.dropped = True
        while not self._ended:
            try:
                taken = self._socket.send(flood, socket.MSG_NOSIGNAL)
                self.judge.said(flood[:taken], 0)
                flood = flood[taken:] + flood[:taken]
            except BlockingIOError:
                self.house.pass_time(SEND_DEADLINE)
                if self._poll(select.POLLRDHUP, 0.01):
                    return
            except (BrokenPipeError, ConnectionResetError):
                return

    def leave(self, choices: Choices) -> None:
        """Hang up in the middle of whatever it is."""
        if choices.seldom() and choices.seldom():
            self.judge.dropped = True
            self.close()
            self._ended = True

    # the wire

    def send(self, sent: Sent) -> None:
        """Put it on the wire; what the server says meanwhile is heard."""
        if self._ended or not sent.data:
            return
        self.judge.said(sent.data, len(sent.fds))
        rest = memoryview(sent.data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent.fds))] if sent.fds else []
        while rest:
            try:
                count = self._socket.sendmsg([rest], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLIN | select.POLLOUT)
                self.hear()
                if self._ended:
                    return
            except (BrokenPipeError, ConnectionResetError):
                return  # what it said last is still to be heard
            else:
                rest, rights = rest[count:], []

    def hear(self) -> None:
        """Take all that is there."""
        while not self._ended:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(1 << 16, socket.CMSG_SPACE(64))
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, ancillary = b"", []
            fds = [fd for _, _, rights in ancillary for fd in array.array("i", rights)]
            if not data:
                self._ended = True
            self.judge.heard(data)
            for fd in fds:
                if self._twin is None and stat.S_ISSOCK(os.fstat(fd).st_mode):
                    self._twin = socket.socket(fileno=fd)
                    self._twin.setblocking(False)
                else:
                    os.close(fd)
            self._unheard += data

    def _asked(self) -> list[bytes]:
        """The headers and first fields of DMA_READ and DMA_WRITE that came since this was last asked."""
        messages, self._unheard = cut(self._unheard)
        for answer in messages:
            if answer.command == MIG_READ and answer.kind == 1 and len(self._stream) < MAX_STREAM:
                self._stream += answer.payload[MIG_HEAD:]
        if self._twin is not None:
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                self._twin_unheard += self._twin.recv(1 << 16)
            more, self._twin_unheard = cut(self._twin_unheard)
            messages += more
        return [
            struct.pack("=HHIII", m.message_id, m.command, m.size, m.flags, m.error) + m.payload[:16]
            for m in messages
            if m.kind == 0
        ]

    def _answer(self, choices: Choices, asked: bytes | None) -> bytes:
        message_id, command, address, count = choices.below(1 << 16), DMA_READ, 0, 16
        if asked is not None and len(asked) == HEADER_SIZE + 16:
            message_id, command = struct.unpack_from("=HH", asked)
            address, count = struct.unpack_from("=QQ", asked, HEADER_SIZE)
        if choices.seldom():
            message_id ^= 1
        if choices.seldom():
            return message(command, message_id=message_id, flags=REPLY | ERROR)
        count = min(count if choices.often() else choices.number(16), 1 << 16)
        content = b""
        if command == DMA_READ:
            content = self.zoo.guest[address : address + count] if choices.often() else b""
            content = content.ljust(count if choices.often() else choices.below(70), b"\xa5")
        payload = struct.pack("=QQ", address, count if choices.often() else choices.number(64)) + content
        return message(command, payload, message_id=message_id, flags=REPLY)

    def _say_on_twin(self, data: bytes) -> None:
        assert self._twin is not None
        try:
            self._twin.send(data, socket.MSG_NOSIGNAL)
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            return

    def _write(self, region: int, offset: int, width: int, value: int) -> None:
        payload = access(offset, region, width) + value.to_bytes(width, "little")
        self.send(Sent(message(REGION_WRITE, payload, message_id=2, flags=NO_REPLY)))

    def _wait(self, events: int) -> None:
        if not self._poll(events, PATIENCE):
            raise HangError("the server neither takes nor says anything")

    def _poll(self, events: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, events)
        return bool(poll.poll(1000 * seconds))


_ACTS: Final[tuple[Callable[[Player, Choices], None], ...]] = (
    *(Player.ask,) * 2,
    Player.use_block,  # here, so that what was found before is played as it was
    *(Player.ask,) * 5,
    Player.ask_much,
    Player.ask_in_pieces,
    Player.scribble,
    *(Player.converse,) * 3,
    Player.map_memory,
    Player.bring_up,
    Player.answer,
    Player.abuse_twin,
    Player.listen,
    Player.save,
    Player.load,
    Player.betray,
    Player.babble,
    Player.propose,
    Player.wait,
    Player.stop_reading,
    Player.leave,
)


_BEGINNINGS: Final[tuple[Callable[[Player, Choices], None], ...]] = (
    Player.listen,
    Player.propose,
    *(Player.begin,) * 2,
    *(Player.begin_well,) * 4,
)


def play(house: House, zoo: Zoo, choices: Choices) -> int:
    """A whole stay of one client, and what is left of it; the number of messages exchanged.

    Raises AssertionError for whatever the server does wrong.
    """
    zoo.refresh()
    player = Player(house, zoo)
    try:
        choices.pick(_BEGINNINGS)(player, choices)
        while choices.left:
            player.step(choices)
        exchanged = player.finish()
    finally:
        player.close()
    house.check()
    return exchanged
