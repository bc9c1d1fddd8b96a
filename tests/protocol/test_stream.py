"""However a byte stream is cut, the same events come out, and descriptors go to the message they were sent
with.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from protocol import Broken, Connection, Event, Role
from tests.protocol import wire
from tests.protocol.wire import message, proposal, read_request, ready_server, write_request


@dataclass(frozen=True)
class Sent:
    """One sendmsg of a peer: a message and its descriptors."""

    data: bytes
    fds: tuple[int, ...] = ()


def kernel_pieces(messages: list[Sent], sizes: list[int]) -> list[tuple[bytes, tuple[int, ...]]]:
    """What recvmsg gives for a unix stream socket, model of unix_stream_read_generic.

    A call with room for `size` bytes goes through the segments. It takes a segment's descriptors with the
    segment's first byte, and ends with the segment that had some, even if there is room.
    """
    pieces: list[tuple[bytes, tuple[int, ...]]] = []
    queue = [(bytearray(sent.data), sent.fds) for sent in messages]
    wanted = iter(sizes)
    while queue:
        room = next(wanted, 1 << 20)
        data = b""
        got: tuple[int, ...] = ()
        while queue and room and not got:
            segment, got = queue[0]
            part = bytes(segment[:room])
            del segment[: len(part)]
            data += part
            room -= len(part)
            if segment:
                queue[0] = (segment, ())
                break
            queue.pop(0)
        pieces.append((data, got))
    return pieces


def events_of(connection: Connection, pieces: list[tuple[bytes, tuple[int, ...]]]) -> list[Event]:
    events: list[Event] = []
    for data, fds in pieces:
        if connection.closed:
            break
        events += connection.receive(data, fds)
    return events


plain = st.one_of(
    st.builds(
        read_request, st.integers(0, 0xFFFF), st.integers(0, 9), st.integers(0, 4096), st.integers(0, 64)
    ),
    st.builds(
        write_request, st.integers(0, 0xFFFF), st.integers(0, 9), st.integers(0, 4096), st.binary(max_size=70)
    ),
    st.builds(message, st.integers(0, 0xFFFF), st.integers(0, 20), st.binary(max_size=40)),
)
descriptors = st.lists(st.integers(3, 1000), min_size=1, max_size=4).map(tuple)
sent = st.one_of(st.builds(Sent, plain), st.builds(Sent, plain, descriptors))
sizes = st.lists(st.integers(1, 80), max_size=60)


@given(st.lists(sent, max_size=8), sizes)
def test_cutting_and_joining_changes_nothing(messages: list[Sent], sizes: list[int]) -> None:
    whole = events_of(ready_server(), [(one.data, one.fds) for one in messages])
    assert len(whole) == len(messages)
    server = ready_server()
    assert events_of(server, kernel_pieces(messages, sizes)) == whole
    assert server.at_boundary


@given(sizes)
def test_cutting_the_first_messages_changes_nothing(sizes: list[int]) -> None:
    messages = [
        Sent(proposal(json=b'{"capabilities":{"max_msg_fds":16}}\0')),
        Sent(message(1, wire.GET_INFO, b"\x10" + bytes(15))),
        Sent(write_request(2, 0, 0, bytes(5000))),
    ]
    whole = events_of(Connection(Role.SERVER), [(one.data, one.fds) for one in messages])
    assert events_of(Connection(Role.SERVER), kernel_pieces(messages, sizes)) == whole


@given(st.lists(sent, max_size=4), st.integers(0, 15), sizes)
def test_cutting_a_stream_that_breaks_changes_nothing(
    messages: list[Sent], size: int, sizes: list[int]
) -> None:
    broken = Sent(bytes(4) + size.to_bytes(4, "little") + bytes(8))
    messages = [*messages, broken]
    whole = events_of(ready_server(), [(one.data, one.fds) for one in messages])
    cut = events_of(ready_server(), kernel_pieces(messages, sizes))
    assert isinstance(whole[-1], Broken)
    assert [repr(event) for event in cut] == [repr(event) for event in whole]


def test_one_byte_at_a_time() -> None:
    messages = [Sent(message(1, wire.DMA_MAP, bytes(32)), (5,)), Sent(read_request(2, 7, 0, 4))]
    events = events_of(ready_server(), kernel_pieces(messages, [1] * 80))
    assert [event.fds for event in events] == [(5,), ()]


def test_the_buffer_may_be_reused_after_receiving() -> None:
    server = ready_server()
    buffer = bytearray(write_request(1, 2, 0, b"payload!"))
    (event,) = server.receive(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    buffer.append(0)
    assert getattr(event, "data", None) == b"payload!"
