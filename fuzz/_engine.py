"""The protocol's engine, both roles, without a socket: any bytes with any descriptors, cut anyhow."""

from __future__ import annotations

from fuzz._choices import Choices
from protocol import (
    Broken,
    Command,
    Connection,
    Event,
    Limits,
    LocalProtocolError,
    Negotiated,
    Refused,
    Reply,
    Request,
    Role,
)
from protocol._fields import Record
from protocol.commands import SHAPES
from protocol.limits import HEADER_SIZE
from protocol.messages import Header, HeaderFlags, Version

PROPOSAL = b'{"capabilities":{"max_msg_fds":16,"write_multiple":true,"twin_socket":{"supported":true}}}\0'


class Engine:
    """The target: `run(data)` raises for whatever the engine does wrong."""

    name = "engine"

    def __init__(self) -> None:
        self.exchanges = 0

    def close(self) -> None:
        """Nothing is held."""

    def seeds(self) -> list[bytes]:
        """Every message of the protocol, as requests to a server and as replies to a client."""
        found = []
        for shape in SHAPES.values():
            for record, flags, role in (
                (shape.request.record, HeaderFlags(0), b"\0"),
                (shape.reply.record, HeaderFlags.REPLY, b"\1"),
            ):
                for tail in (b"", bytes(16), b"\1" * 64):
                    payload = _sample(record) + tail
                    header = Header(1, shape.command, HEADER_SIZE + len(payload), flags, 0)
                    # ready, a piece of all that follows, no descriptors
                    found.append(role + b"\1\1" + bytes((shape.command,)) * 4 + header.encode() + payload)
        return found

    def run(self, data: bytes) -> None:
        """One connection."""
        choices = Choices(data)
        engine = self._client(choices) if choices.byte() & 1 else self._server(choices)
        given: list[int] = []
        back: list[int] = []
        number = 0
        while choices.left and not engine.closed:
            whole = choices.byte() & 1
            fds = [number + 1 + n for n in range(choices.pick((0, 0, 0, 1, 2, 15, 17)))]
            number += len(fds)
            piece = choices.bytes(1 << 16 if whole else 1 + choices.below(40))
            given += fds
            events = engine.receive(piece, fds, fds_lost=choices.seldom())
            self.exchanges += len(events)
            for event in events:
                back += event.fds
                _answer(engine, event)
            if any(isinstance(event, Broken) for event in events[:-1]):
                raise AssertionError("something comes after the end")
        if not engine.closed:
            back += engine.close()
        if back != given:
            raise AssertionError(f"descriptors given {given}, got back {back}")

    @staticmethod
    def _server(choices: Choices) -> Connection:
        engine = Connection(Role.SERVER, Limits(max_data_xfer_size=choices.pick((1 << 20, 1, 4096))))
        if choices.byte() & 1:
            payload = Version(0, 1).encode() + PROPOSAL
            header = Header(0, Command.VERSION, HEADER_SIZE + len(payload), HeaderFlags(0), 0)
            (event,) = engine.receive(header.encode() + payload)
            assert isinstance(event, Negotiated)
        return engine

    @staticmethod
    def _client(choices: Choices) -> Connection:
        engine = Connection(Role.CLIENT)
        engine.propose()
        if choices.byte() & 1:
            payload = Version(0, 1).encode() + b'{"capabilities":{"max_msg_fds":8}}\0'
            header = Header(0, Command.VERSION, HEADER_SIZE + len(payload), HeaderFlags.REPLY, 0)
            (event,) = engine.receive(header.encode() + payload)
            assert isinstance(event, Negotiated)
            for number in choices.bytes(4):
                _ask(engine, number)
        return engine


def _ask(engine: Connection, number: int) -> None:
    """A question of each kind, so that any reply may find one; ids count from 1."""
    commands = [shape for shape in SHAPES.values() if shape.sender is Role.CLIENT]
    shape = SHAPES[number] if number in SHAPES else commands[number % len(commands)]
    record = shape.request.record
    body = record.decode(_sample(record)) if record is not None else None
    try:
        engine.request(shape.command, body)
    except LocalProtocolError:
        return


def _sample(record: type[Record] | None) -> bytes:
    """The record with its size where the number of bytes belongs, and small numbers."""
    if record is None:
        return b""
    sample = bytearray()
    for field in record.layout:
        value = record.size if field.name == "argsz" else int(field.name in ("flags", "length", "count"))
        sample += value.to_bytes(field.size, "little")
    return bytes(sample)


def _answer(engine: Connection, event: Event) -> None:
    """Every event can be answered as its text says, while the engine is open."""
    if engine.closed:
        return
    if isinstance(event, Request):
        try:
            answer = engine.error(event, 22)
        except LocalProtocolError:
            raise AssertionError(f"{event} cannot be refused") from None
        _expect(answer, event.no_reply)
    elif isinstance(event, Refused):
        _expect(engine.error(event, event.errno), event.no_reply)
        if not 0 < event.errno < 134:
            raise AssertionError(f"{event} with a strange errno")
    elif isinstance(event, Reply) and event.command not in SHAPES:
        raise AssertionError(f"{event} to nothing")


def _expect(answer: bytes, no_reply: bool) -> None:
    if len(answer) != (0 if no_reply else HEADER_SIZE):
        raise AssertionError(f"a refusal of {len(answer)} bytes")
