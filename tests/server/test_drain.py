import os
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from device.dma import PinnedError
from device.errors import DeviceError
from protocol import Connection, Negotiated, Refused, Request, Role
from protocol.limits import RECEIVE_SIZE, SessionLimits
from protocol.messages import RegionAccess
from server._drain import Drain, Outcome
from tests.server.raw import (
    DMA_MAP,
    DMA_UNMAP,
    ERROR,
    GET_INFO,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    access,
    dma,
    message,
    version,
)
from tests.server.world import world

MEMORY = 4096


class Memory:
    """One region of bytes, and what was refused."""

    def __init__(self) -> None:
        self.bytes = bytearray(MEMORY)
        self.failures: list[tuple[int, Exception]] = []

    def read(self, region: int, offset: int, count: int) -> bytes:
        """The bytes there."""
        self._check(region, offset, count)
        return bytes(self.bytes[offset : offset + count])

    def write(self, region: int, offset: int, data: bytes) -> None:
        """Put bytes there."""
        self._check(region, offset, len(data))
        self.bytes[offset : offset + len(data)] = data

    def failed(self, command: int, error: Exception) -> int:
        """The errno for the reply."""
        self.failures.append((command, error))
        return error.errno or 5 if isinstance(error, DeviceError) else 5

    def _check(self, region: int, offset: int, count: int) -> None:
        if region or offset + count > MEMORY:
            raise DeviceError(22, "outside")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def drain_of(memory: Memory, ours: socket.socket) -> Drain:
    drain = Drain(ours.fileno(), memory.read, memory.write, memory.failed)
    drain.direct = True
    drain.credit = 1_000_000
    return drain


# --- the fast road and the slow one lead to the same place


def negotiated() -> Connection:
    engine = Connection(Role.SERVER)
    (event,) = engine.receive(version())
    assert isinstance(event, Negotiated)
    return engine


def answer(engine: Connection, memory: Memory, data: bytes | memoryview) -> bytes:
    """What the engine alone has to say."""
    said = b""
    for event in engine.receive(data):
        assert isinstance(event, Request | Refused)
        if isinstance(event, Refused):
            said += engine.error(event, event.errno)
            continue
        body = event.body
        assert isinstance(body, RegionAccess)
        try:
            if event.command == REGION_READ:
                said += engine.reply(event, body, memory.read(body.region, body.offset, body.count))
            else:
                memory.write(body.region, body.offset, event.data)
                said += engine.reply(event, body)
        except DeviceError as error:
            said += engine.error(event, error.errno or 5)
    return said


counts = st.sampled_from([0, 1, 2, 4, 8, 63, 64, 65, 200])
offsets = st.one_of(st.integers(0, MEMORY + 10), st.integers((1 << 64) - 80, (1 << 64) - 1))


@st.composite
def accesses(draw: st.DrawFn) -> bytes:
    """A register access, mostly sound."""
    command = draw(st.sampled_from([REGION_READ, REGION_WRITE]))
    count = draw(counts)
    payload = access(draw(offsets), draw(st.sampled_from([0, 0, 0, 1, 0xFFFFFFFF])), count)
    extra = draw(st.sampled_from([0, 0, 0, 0, 1, -1]))
    if command == REGION_WRITE:
        payload += draw(st.binary(min_size=max(0, count + extra), max_size=max(0, count + extra)))
    elif extra > 0:
        payload += b"x"
    flags = draw(st.sampled_from([0, 0, NO_REPLY, 0x20, 0x40]))
    return message(command, payload, message_id=draw(st.integers(0, 0xFFFF)), flags=flags)


@given(st.lists(accesses(), max_size=20), st.lists(st.integers(1, 300), max_size=20))
def test_it_says_what_the_engine_says_however_the_stream_is_cut(
    messages: list[bytes], cuts: list[int]
) -> None:
    stream = b"".join(messages)
    expected_memory, memory = Memory(), Memory()
    expected = answer(negotiated(), expected_memory, stream)
    engine = negotiated()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.setblocking(False)
        drain = drain_of(memory, ours)
        said = b""
        while stream:
            cut = cuts.pop() if cuts else len(stream)
            theirs.send(stream[:cut])
            stream = stream[cut:]
            while (outcome := drain.run()) != Outcome.EMPTY:
                assert outcome == Outcome.OTHER
                data, fds, lost = drain.take()
                assert (fds, lost) == ([], False)
                ours.sendall(answer(engine, memory, data))
                drain.direct = engine.at_boundary
        ours.shutdown(socket.SHUT_WR)
        while piece := theirs.recv(1 << 16):
            said += piece
    assert said == expected
    assert memory.bytes == expected_memory.bytes


def random_accesses(seed: int, count: int) -> list[bytes]:
    """Requests of all sizes at the edges of the regions of a real card, in and out of place."""
    chance = random.Random(seed)
    messages = []
    for number in range(count):
        size = chance.choice([0, 1, 2, 3, 4, 8, 16, 63, 64, 65, 100])
        region = chance.choice([0, 0, 2, 2, 7, 7, 7, 1, 6, 8, 9, 0xFFFFFFFF])
        edge = chance.choice([0, 0x400, 0x800, 0x1000, 0x2000, 1 << 32, 1 << 63, (1 << 64) - 1])
        offset = max(0, min(edge + chance.randint(-70, 70), (1 << 64) - 1))
        command = chance.choice([REGION_READ, REGION_WRITE])
        payload = access(offset, region, size) + (chance.randbytes(size) if command == REGION_WRITE else b"")
        flags = chance.choice([0, 0, 0, NO_REPLY, ERROR, 0x40])
        messages.append(message(command, payload, message_id=number, flags=flags))
    return messages


def random_windows(seed: int, count: int, memory: int) -> list[tuple[bytes, list[int]]]:
    """DMA_MAP and DMA_UNMAP of few addresses, so that many meet, in order and not; some with descriptors."""
    chance = random.Random(seed)
    messages = []
    for number in range(count):
        address = chance.choice([0, 4096, 8192, 12288, 100, (1 << 64) - 4096])
        size = chance.choice([4096, 4096, 4096, 8192, 0, 1, (1 << 64) - 4096, (1 << 64) - 1])
        argsz = chance.choice([32, 32, 32, 40, 31, 0])
        fds = [memory] * chance.choice([0, 0, 1, 1, 1, 2])
        if chance.random() < 0.6:
            offset = chance.choice([0, 4096, 1, 1 << 40, (1 << 64) - 4096])
            payload = struct.pack(
                "=IIQQQ", argsz, chance.choice([3, 3, 3, 1, 0, 4, 16]), offset, address, size
            )
            command = DMA_MAP
        else:
            payload = struct.pack("=IIQQ", argsz - 8 & 0xFF, chance.choice([0, 0, 0, 1, 2, 4]), address, size)
            command = DMA_UNMAP
        payload += chance.choice([b"", b"", b"", b"", b"x"])
        flags = chance.choice([0, 0, 0, 0, NO_REPLY, ERROR, 0x40])
        messages.append((message(command, payload, message_id=number, flags=flags), fds))
    return messages


async def replies_of_a_card(
    tmp_path: Path, messages: Sequence[tuple[bytes, list[int]]], *, whole: bool, broken: bool = False
) -> bytes:
    """All that a served card says; ``whole``: each request comes in one piece, so the drain may answer."""
    last = message(REGION_READ, access(0, 7, 4), message_id=0xFFFF)
    said = b""
    async with world(tmp_path, limits=SessionLimits(tellings=0)) as served:
        served.card.registers.broken = broken
        client = await served.client()
        for request, fds in [*messages, (last, [])]:
            if not whole:
                await client.send(request[:16], fds)
                await trio.testing.wait_all_tasks_blocked()
            await client.send(request[0 if whole else 16 :], fds if whole else ())
            await trio.testing.wait_all_tasks_blocked()
        answered = -1
        while answered != 0xFFFF:
            reply = await client.receive()
            assert reply is not None
            answered = reply.message_id
            said += struct.pack("=HHIII", answered, reply.command, reply.size, reply.flags, reply.error)
            said += reply.payload
    return said


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_a_card_answers_on_both_roads_with_the_same_bytes(
    tmp_path: Path, seed: int, broken: bool
) -> None:
    messages = [(request, list[int]()) for request in random_accesses(seed, 300)]
    fast = await replies_of_a_card(tmp_path, messages, whole=True, broken=broken)
    slow = await replies_of_a_card(tmp_path, messages, whole=False, broken=broken)
    assert fast == slow


@pytest.mark.parametrize("seed", range(4))
async def test_windows_come_and_go_on_both_roads_with_the_same_bytes(tmp_path: Path, seed: int) -> None:
    memory = os.memfd_create("guest")
    os.truncate(memory, 1 << 16)
    messages = random_windows(seed, 400, memory)
    fast = await replies_of_a_card(tmp_path, messages, whole=True)
    slow = await replies_of_a_card(tmp_path, messages, whole=False)
    os.close(memory)
    assert fast == slow


# --- DMA windows


class Asked:
    """What a drain asked for; a descriptor as whether it was open then."""

    def __init__(self) -> None:
        self.maps: list[tuple[int, int, int, int, bool]] = []
        self.fds: list[int] = []
        self.unmaps: list[tuple[int, int]] = []
        self.held = False

    def dma_map(self, flags: int, offset: int, address: int, length: int, fd: int | None) -> None:
        """Note it, and refuse the window at 0."""
        self.maps.append((flags, offset, address, length, fd is not None and os.fstat(fd).st_size == 0))
        if fd is not None:
            self.fds.append(fd)
        if not address:
            raise DeviceError(17, "there")

    def dma_unmap(self, address: int, length: int) -> None:
        """Note it, unless the window is held."""
        if self.held:
            raise PinnedError(address, address + length - 1, "test")
        self.unmaps.append((address, length))


def with_windows(ours: socket.socket) -> tuple[Drain, Asked]:
    memory, asked = Memory(), Asked()
    drain = Drain(
        *(ours.fileno(), memory.read, memory.write, memory.failed),
        dma_map=asked.dma_map,
        dma_unmap=asked.dma_unmap,
    )
    drain.direct, drain.credit = True, 100
    return drain, asked


@pytest.mark.parametrize("address", [0, 0x1000])
def test_a_window_is_mapped_without_the_engine_and_its_descriptor_closed(
    pair: tuple[socket.socket, socket.socket], address: int
) -> None:
    ours, theirs = pair
    drain, asked = with_windows(ours)
    fd = os.memfd_create("guest")
    socket.send_fds(theirs, [message(DMA_MAP, dma(address, 0x2000, offset=0x3000))], [fd])
    os.close(fd)
    assert drain.run() == Outcome.EMPTY
    assert asked.maps == [(3, 0x3000, address, 0x2000, True)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(asked.fds[0])
    refused = not address
    expected = struct.pack("=HHIII", 1, DMA_MAP, 16, 1 | ERROR * refused, 17 * refused)
    assert theirs.recv(100) == expected


def test_windows_without_descriptors_are_mapped_and_unmapped_in_turn(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    drain, asked = with_windows(ours)
    span = struct.pack("=IIQQ", 64, 0, 0x1000, 0x2000)
    theirs.send(message(DMA_MAP, dma(0x1000, 0x2000)) + message(DMA_UNMAP, span))
    assert drain.run() == Outcome.EMPTY
    assert (asked.maps, asked.unmaps) == ([(3, 0, 0x1000, 0x2000, False)], [(0x1000, 0x2000)])
    assert theirs.recv(100)[16:] == message(DMA_UNMAP, struct.pack("=I", 24) + span[4:], flags=1)


def test_an_unmap_that_has_to_wait_is_the_engines_and_so_is_what_follows(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    drain, asked = with_windows(ours)
    asked.held = True
    waits = message(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0x1000, 0x2000)) + message(DMA_MAP, dma(0, 1))
    theirs.send(message(DMA_MAP, dma(0x1000, 0x2000)) + waits)
    assert drain.run() == Outcome.OTHER
    assert bytes(drain.take()[0]) == waits
    assert (len(asked.maps), asked.unmaps, drain.credit) == (1, [], 99)


ODD_WINDOWS = {
    "posted": message(DMA_MAP, dma(0x1000, 0x1000), flags=NO_REPLY),
    "two messages": 2 * message(DMA_MAP, dma(0x1000, 0x1000)),
    "half a message": message(DMA_MAP, dma(0x1000, 0x1000))[:40],
    "another command": message(REGION_READ, access(0, 0, 4)),
    "an unmapping": message(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0x1000, 0x1000)),
}


@pytest.mark.parametrize("data", ODD_WINDOWS.values(), ids=ODD_WINDOWS)
def test_what_a_descriptor_may_not_belong_to_is_the_engines_from_its_first_byte(
    pair: tuple[socket.socket, socket.socket], data: bytes
) -> None:
    ours, theirs = pair
    drain, asked = with_windows(ours)
    fd = os.memfd_create("guest")
    socket.send_fds(theirs, [data], [fd])
    os.close(fd)
    assert drain.run() == Outcome.OTHER
    taken, fds, lost = drain.take()
    assert (bytes(taken), len(fds), lost) == (data, 1, False)
    os.close(fds[0])
    assert not asked.maps
    assert not asked.unmaps


# --- outcomes


def test_nothing_there_is_empty(pair: tuple[socket.socket, socket.socket]) -> None:
    assert drain_of(Memory(), pair[0]).run() == Outcome.EMPTY


def test_a_peer_that_hung_up_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    assert drain_of(Memory(), pair[0]).run() == Outcome.GONE


def test_a_peer_that_hung_up_with_replies_unread_is_gone(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ours.send(b"unread")
    theirs.send(message(REGION_READ, access(0, 0, 4)))
    theirs.close()
    assert drain_of(Memory(), ours).run() == Outcome.GONE


def test_used_up_credit_ends_the_turn_and_loses_nothing(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    drain = drain_of(Memory(), ours)
    theirs.send(message(REGION_READ, access(0, 0, 4)) * 5)
    for _ in range(2):
        drain.credit = 2
        assert drain.run() == Outcome.TURN
        assert len(theirs.recv(1000)) == 2 * 36
    drain.credit = 2
    assert drain.run() == Outcome.EMPTY
    assert len(theirs.recv(1000)) == 36


def test_what_it_may_not_answer_goes_to_the_engine(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    drain = drain_of(Memory(), ours)
    drain.direct = False
    theirs.send(message(REGION_READ, access(0, 0, 4)))
    assert drain.run() == Outcome.OTHER
    assert bytes(drain.take()[0]) == message(REGION_READ, access(0, 0, 4))
    assert drain.run() == Outcome.EMPTY


def test_the_engine_gets_all_from_the_first_message_on_that_is_not_answered_here(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    drain = drain_of(Memory(), ours)
    rest = message(GET_INFO, bytes(16)) + message(REGION_READ, access(0, 0, 4))
    theirs.send(message(REGION_READ, access(0, 0, 4)) + rest)
    assert drain.run() == Outcome.OTHER
    assert bytes(drain.take()[0]) == rest
    assert len(theirs.recv(1000)) == 36


def test_descriptors_go_to_the_engine_with_everything_that_came_along(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    drain = drain_of(Memory(), ours)
    sent = message(REGION_READ, access(0, 0, 4)) * 2
    socket.send_fds(theirs, [sent], [0, 1, 2])
    assert drain.run() == Outcome.OTHER
    data, fds, lost = drain.take()
    assert (bytes(data), len(fds), lost) == (sent, 3, False)
    for fd in fds:
        assert not os.get_inheritable(fd)
        os.close(fd)
    assert drain.take()[1:] == ([], False)


def test_a_reply_that_does_not_fit_is_kept(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    drain = drain_of(Memory(), ours)
    requests = replies = 0
    outcome = Outcome.EMPTY
    while outcome == Outcome.EMPTY:
        theirs.send(message(REGION_READ, access(0, 0, 64)))
        requests += 1
        outcome = Outcome(drain.run())
    assert outcome == Outcome.BLOCKED
    rest = drain.take_unsent()
    assert drain.take_unsent() == b""
    received = b""
    while len(received) < (requests - 1) * 96:
        received += theirs.recv(1 << 16)
    received += rest
    while received:
        assert struct.unpack_from("=I", received, 4) == (96,)
        received = received[96:]
        replies += 1
    assert replies == requests


def test_a_broken_socket_is_an_error() -> None:
    read_end, write_end = os.pipe()
    memory = Memory()
    drain = Drain(read_end, memory.read, memory.write, memory.failed)
    drain.credit = 1
    with pytest.raises(OSError, match="Socket operation on non-socket"):
        drain.run()
    os.close(read_end)
    os.close(write_end)


def test_without_credit_nothing_is_taken(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    drain = drain_of(Memory(), ours)
    drain.credit = 0
    theirs.send(b"x" * 10)
    assert drain.run() == Outcome.TURN
    assert ours.recv(100) == b"x" * 10


def test_more_than_one_buffer_is_taken_piece_by_piece(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    drain = drain_of(Memory(), ours)
    drain.direct = False
    sent = theirs.send(b"x" * (2 * RECEIVE_SIZE))
    received = 0
    while drain.run() == Outcome.OTHER:
        received += len(drain.take()[0])
    assert received == sent


# --- what the device says


@pytest.mark.parametrize(
    "read",
    [
        lambda *_: b"too short",
        lambda *_: bytearray(4),
        lambda *_: None,
        lambda *_: 1 / 0,
    ],
)
def test_a_device_that_answers_nonsense_is_reported(
    pair: tuple[socket.socket, socket.socket], read: Callable[[int, int, int], bytes]
) -> None:
    ours, theirs = pair
    memory = Memory()
    drain = Drain(ours.fileno(), read, memory.write, memory.failed)
    drain.direct = True
    drain.credit = 10
    theirs.send(message(REGION_READ, access(0, 0, 4), message_id=3))
    assert drain.run() == Outcome.EMPTY
    assert struct.unpack("=HHIII", theirs.recv(100)) == (3, REGION_READ, 16, 0x21, 5)
    assert [command for command, _ in memory.failures] == [REGION_READ]


def test_what_is_no_error_of_the_device_passes(pair: tuple[socket.socket, socket.socket]) -> None:
    def interrupt(*_: object) -> bytes:
        raise KeyboardInterrupt

    ours, theirs = pair
    drain = Drain(ours.fileno(), interrupt, Memory().write, Memory().failed)
    drain.direct = True
    drain.credit = 10
    theirs.send(message(REGION_READ, access(0, 0, 4)))
    with pytest.raises(KeyboardInterrupt):
        drain.run()
