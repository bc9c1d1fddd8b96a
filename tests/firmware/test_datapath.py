"""The data path between real rings and real sockets; every step is taken by the test, burst by burst."""

import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device._gate import Gate
from device.dma import DmaWindows
from device.interrupts._lines import MODE_MSIX, Lines
from device.virtio._split import VirtQueue
from device.virtio.faults import FAULTS
from firmware._bursts import BURST
from firmware._cable import LOOPBACK_BUFFER
from firmware._datapath import DataPath
from firmware._filter import ReceiveFilter
from firmware.ports._port import MAX_FRAME
from tests.device.driver_side import DriverRing, GuestMemory, guest_memory
from tests.device.remote_side import Client, map_by_message

OWN = bytes.fromhex("525400000001")
PACKETS, STREAM, LOOPBACK = 0, 1, 2
NO_HEADER = bytes(12)


def frame(payload: bytes = b"payload", destination: bytes = OWN) -> bytes:
    return destination + bytes.fromhex("525400000099") + b"\x08\x00" + payload


class Card:
    """A data path on `framing`, its rings, and the network's end of its port."""

    def __init__(
        self,
        framing: int = PACKETS,
        header: int = 0,
        *,
        mergeable: bool = True,
        guest_csum: bool = False,
        size: int = 256,
        by_message: bool = False,
    ):
        self.dma, self.lines, self.filter = DmaWindows(), Lines(2), ReceiveFilter(OWN)
        self.memory = GuestMemory(8 << 20)
        self.client = Client(self.memory)
        if by_message:
            map_by_message(self.dma, self.client)
        else:
            self.memory.map_into(self.dma)
        self.rx, self.tx = (DriverRing(self.memory, size) for _ in range(2))
        queues = [VirtQueue(self.dma, n, size) for n in range(2)]
        for n, (queue, ring) in enumerate(zip(queues, (self.rx, self.tx), strict=True)):
            queue.enable(size, *ring.addresses, indirect=True)
            queue.vector = n
        self.lines.mode = MODE_MSIX
        self.path = DataPath(Gate(), self.dma, self.lines, queues[0], queues[1], self.filter)
        kind = socket.SOCK_STREAM if framing == STREAM else socket.SOCK_SEQPACKET
        self.network, self.port = socket.socketpair(socket.AF_UNIX, kind)
        self.network.setblocking(False)
        self.port.setblocking(False)
        self.path.attach(-1 if framing == LOOPBACK else self.port.fileno(), framing, header)
        self.path.start(mergeable=mergeable, checksum_to_driver=guest_csum)

    def close(self) -> None:
        self.network.close()
        self.port.close()
        self.client.close()
        self.memory.close()

    def settle(self) -> None:
        while self.path.service():
            pass

    def send(self, *parts: bytes, header: bytes = NO_HEADER) -> None:
        buffers = []
        for part in (header, *parts):
            address = self.memory.allocate(len(part), 1)
            self.memory.write(address, part)
            buffers.append((address, len(part), False))
        self.tx.add(buffers)

    def offer(self, *lengths: int) -> list[int]:
        addresses = [self.memory.allocate(length) for length in lengths]
        for address, length in zip(addresses, lengths, strict=True):
            self.rx.add([(address, length, True)])
        return addresses

    def counter(self, name: str) -> int:
        return self.path.counters()[name]


@pytest.fixture(params=[False, True], ids=["mapped", "by message"])
def make_card(request: pytest.FixtureRequest) -> Iterator[Callable[..., Card]]:
    """Cards that reach their driver's memory in either way."""
    made: list[Card] = []

    def make(*args: int, **kwargs: bool) -> Card:
        made.append(Card(*args, **kwargs, by_message=request.param))
        return made[-1]

    yield make
    for card in made:
        card.close()


@pytest.fixture
def card(make_card: Callable[..., Card]) -> Card:
    return make_card()


# --- transmit


def test_a_frame_in_pieces_leaves_whole_and_its_buffers_return(card: Card) -> None:
    card.send(frame(b"first "), b"second")
    card.settle()
    assert card.network.recv(2000) == frame(b"first second")
    assert [written for _, written in card.tx.used()] == [0]
    assert card.lines.vector_pending(1)


def test_a_header_in_two_pieces_is_skipped(card: Card) -> None:
    card.send(b"\0" * 5 + frame(), header=b"\0" * 7)
    card.settle()
    assert card.network.recv(2000) == frame()


def test_a_port_with_a_header_gets_the_drivers(make_card: Callable[..., Card]) -> None:
    card = make_card(PACKETS, 12)
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)
    card.send(frame(), header=header)
    card.settle()
    assert card.network.recv(2000) == header + frame()


def test_the_port_that_is_full_stops_the_queue_and_loses_nothing(card: Card) -> None:
    card.port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for n in range(40):
        card.send(frame(n.to_bytes(1, "big") * 900))
    card.settle()
    first = len(card.tx.used())
    assert 0 < first < 40
    got: list[bytes] = []
    while len(got) < 40:
        got.append(card.network.recv(2000))
        card.settle()
    assert got == [frame(n.to_bytes(1, "big") * 900) for n in range(40)]
    assert card.counter("tx_dropped") == 0


@pytest.mark.parametrize(
    ("length", "passes"), [(13, False), (14, True), (MAX_FRAME, True), (MAX_FRAME + 1, False)]
)
def test_a_frame_of_an_impossible_length_is_dropped_and_its_buffer_returns(
    card: Card, length: int, passes: bool
) -> None:
    card.port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)
    card.send(b"x" * length)
    card.settle()
    assert len(card.tx.used()) == 1
    assert (card.counter("tx_frames"), card.counter("tx_dropped")) == (int(passes), int(not passes))


def test_segmentation_that_was_not_offered_is_dropped(card: Card) -> None:
    card.send(frame(), header=struct.pack("<BBHHHHH", 0, 1, 54, 1448, 0, 0, 0))
    card.settle()
    assert card.counter("tx_dropped") == 1
    assert len(card.tx.used()) == 1


def udp(payload: bytes) -> tuple[bytes, int]:
    """An IPv4 UDP frame with only the pseudo-header's sum in its checksum, and what that should become."""
    addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    length = 8 + len(payload)
    pseudo = addresses + struct.pack("!BBH", 0, 17, length)

    def fold(data: bytes) -> int:
        data += b"\0" * (len(data) % 2)
        total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return total

    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0) + addresses
    segment = struct.pack("!HHHH", 1000, 2000, length, fold(pseudo)) + payload
    zeroed = struct.pack("!HHHH", 1000, 2000, length, 0) + payload
    return frame(ip + segment), (~fold(pseudo + zeroed) & 0xFFFF) or 0xFFFF


@settings(max_examples=50)
@given(st.binary(max_size=200))
def test_a_checksum_the_port_cannot_finish_is_finished_here(payload: bytes) -> None:
    card = Card()
    try:
        packet, expected = udp(payload)
        card.send(packet, header=struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0))
        card.settle()
        sent = card.network.recv(2000)
        assert int.from_bytes(sent[40:42], "big") == expected
        assert sent[:40] + sent[42:] == packet[:40] + packet[42:]
    finally:
        card.close()


@pytest.mark.parametrize(("start", "offset"), [(0xFFFF, 6), (34, 0xFFFF), (40, 1), (41, 0)])
def test_checksum_offsets_outside_the_frame_cost_the_frame_only(card: Card, start: int, offset: int) -> None:
    card.send(frame(b"x" * 27), header=struct.pack("<BBHHHHH", 1, 0, 0, 0, start, offset, 0))
    card.send(frame())
    card.settle()
    assert card.network.recv(2000) == frame()
    assert card.counter("tx_dropped") == 1


def test_a_buffer_outside_the_windows_breaks_the_queue_and_is_reported(card: Card) -> None:
    card.tx.add([(0x900000000, 100, False)])
    card.settle()
    assert card.path.tx.fault == FAULTS[8]
    assert os.eventfd_read(card.path.event_fd) == 1
    card.send(frame())
    card.settle()
    assert card.counter("tx_frames") == 0


@pytest.mark.parametrize("framing", [PACKETS, LOOPBACK])
def test_a_frame_in_memory_that_is_truncated_goes_nowhere(
    make_card: Callable[..., Card], framing: int
) -> None:
    """Zeros are not what the driver sent."""
    card = make_card(framing)
    with guest_memory(card.dma, iova=0x10000000) as gone:
        card.send(frame(b"first"))
        card.settle()
        card.tx.add([(gone.iova, 100, False)])
        os.ftruncate(gone.fd, 0)
        card.settle()
        queue = card.path.tx
        card.dma.unmap(gone.iova, gone.size)
    assert queue.fault == FAULTS[8]
    assert card.counter("tx_frames") == 1


def test_with_the_link_down_frames_are_dropped_both_ways(card: Card) -> None:
    card.path.link_up = False
    card.send(frame())
    card.offer(100)
    card.network.send(frame())
    card.settle()
    assert (card.counter("tx_dropped"), card.counter("rx_dropped")) == (1, 1)


# --- receive


def test_a_frame_arrives_behind_a_header_that_counts_its_buffers(card: Card) -> None:
    (address,) = card.offer(1000)
    card.network.send(frame())
    card.settle()
    assert card.rx.used() == [(0, 12 + len(frame()))]
    assert card.memory.read(address, 12 + len(frame())) == bytes(10) + b"\1\0" + frame()
    assert card.lines.vector_pending(0)


def test_a_long_frame_is_spread_over_buffers(card: Card) -> None:
    addresses = card.offer(20, 5, 100, 100)
    card.network.send(frame(b"z" * 60))
    card.settle()
    total = 12 + len(frame(b"z" * 60))
    assert [written for _, written in card.rx.used()] == [20, 5, total - 25]
    data = b"".join(card.memory.read(a, n) for a, n in zip(addresses, (20, 5, total - 25), strict=False))
    assert data == bytes(10) + b"\3\0" + frame(b"z" * 60)


def test_the_count_is_right_when_the_header_itself_lies_in_pieces(card: Card) -> None:
    first, second = card.memory.allocate(11), card.memory.allocate(11)
    card.rx.add([(first, 11, True), (second, 11, True)])
    card.offer(100)
    card.network.send(frame())
    card.settle()
    assert card.memory.read(first, 11)[10] == 2
    assert card.memory.read(second, 1) == b"\0"


def test_a_frame_waits_until_there_are_buffers_enough(card: Card) -> None:
    card.offer(30)
    card.network.send(frame(b"z" * 100))
    card.network.send(frame(b"next"))
    card.settle()
    assert card.rx.used() == []
    card.offer(200, 200)
    card.settle()
    assert [written for _, written in card.rx.used()] == [30, 12 + 14 + 100 - 30, 12 + 18]


def test_without_mergeable_buffers_a_frame_too_long_is_dropped_and_the_buffer_kept(
    make_card: Callable[..., Card],
) -> None:
    card = make_card(mergeable=False)
    card.offer(50)
    card.network.send(frame(b"z" * 100))
    card.network.send(frame(b"fits"))
    card.settle()
    assert [written for _, written in card.rx.used()] == [12 + 18]
    assert card.counter("rx_dropped") == 1


def test_frames_for_others_are_filtered(card: Card) -> None:
    card.filter.promiscuous = False
    card.offer(100)
    card.network.send(frame(destination=bytes.fromhex("525400000002")))
    card.network.send(frame(b"mine"))
    card.settle()
    assert len(card.rx.used()) == 1
    assert card.counter("rx_filtered") == 1


def test_offload_marks_reach_only_a_driver_that_negotiated_them(make_card: Callable[..., Card]) -> None:
    packet, expected = udp(b"data")
    header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0)
    for guest_csum in (True, False):
        card = make_card(PACKETS, 12, guest_csum=guest_csum)
        (address,) = card.offer(500)
        card.network.send(header + packet)
        card.settle()
        assert card.memory.read(address, 1)[0] == int(guest_csum)
        sum_given = int.from_bytes(card.memory.read(address + 12 + 40, 2), "big")
        assert (sum_given == expected) != guest_csum


TCPV4, TCPV6, UDP, ECN = 1, 4, 3, 0x80


@pytest.mark.parametrize(
    ("accepted", "passing"),
    [
        ({}, []),
        ({"tso4_to_driver": True}, [TCPV4]),
        ({"tso6_to_driver": True}, [TCPV6]),
        ({"tso4_to_driver": True, "ecn_to_driver": True}, [TCPV4, TCPV4 | ECN]),
    ],
)
def test_a_port_that_holds_segments_for_an_earlier_driver_gives_none_to_this_one(
    make_card: Callable[..., Card], accepted: dict[str, bool], passing: list[int]
) -> None:
    card = make_card(PACKETS, 12)
    card.path.halt()
    card.path.start(mergeable=True, checksum_to_driver=True, **accepted)
    addresses = card.offer(*[200] * 6)
    for kind in (TCPV4, TCPV4 | ECN, TCPV6, TCPV6 | ECN, UDP, 0):
        card.network.send(struct.pack("<BBHHHHH", 1, kind, 54, 40, 34, 16, 0) + frame(bytes(100)))
    card.settle()
    kinds = [card.memory.read(address + 1, 1)[0] for address in addresses[: len(passing) + 1]]
    assert kinds == [*passing, 0]
    assert card.counter("rx_dropped") == 5 - len(passing)


def test_a_burst_is_bounded_and_goes_on(card: Card) -> None:
    card.offer(*[100] * 64)
    for _ in range(64):
        card.network.send(frame())
    assert card.path.service() == (BURST == 64)
    card.settle()
    assert len(card.rx.used()) == 64


# --- streams


def test_stream_frames_carry_their_length_both_ways(make_card: Callable[..., Card]) -> None:
    card = make_card(STREAM)
    card.send(frame(b"out"))
    card.offer(100)
    card.network.send(struct.pack("!I", 16) + frame(b"in"))
    card.settle()
    assert card.network.recv(2000) == struct.pack("!I", 17) + frame(b"out")
    assert len(card.rx.used()) == 1


def test_a_stream_may_arrive_byte_by_byte(make_card: Callable[..., Card]) -> None:
    card = make_card(STREAM)
    (address, *_) = card.offer(100, 100)
    for byte in struct.pack("!I", 16) + frame(b"in") + struct.pack("!I", 15) + frame(b"x"):
        card.network.send(bytes([byte]))
        card.settle()
    assert [written for _, written in card.rx.used()] == [28, 27]
    assert card.memory.read(address + 12, 16) == frame(b"in")


def test_a_stream_peer_that_reads_slowly_stops_the_queue_and_loses_nothing(
    make_card: Callable[..., Card],
) -> None:
    card = make_card(STREAM)
    card.port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    sent = [frame(bytes([n]) * 60000) for n in range(12)]
    for each in sent:
        card.send(each)
    received = b""
    for _ in range(100000):
        card.settle()
        try:
            received += card.network.recv(1 << 20)
        except BlockingIOError:
            break
    assert received == b"".join(struct.pack("!I", len(each)) + each for each in sent)
    assert card.counter("tx_dropped") == 0


@pytest.mark.parametrize("ending", ["too long", "closed"])
def test_a_stream_that_ends_or_lies_about_a_length_is_a_lost_port(
    make_card: Callable[..., Card], ending: str
) -> None:
    card = make_card(STREAM)
    card.offer(100)
    if ending == "too long":
        card.network.send(struct.pack("!I", MAX_FRAME + 1))
    else:
        card.network.close()
    card.settle()
    assert card.path.port_lost
    assert os.eventfd_read(card.path.event_fd) == 1
    card.send(frame())
    card.settle()
    assert card.counter("tx_dropped") == 1


# --- loopback


def test_what_is_sent_into_a_loopback_comes_back(make_card: Callable[..., Card]) -> None:
    card = make_card(LOOPBACK)
    (address,) = card.offer(100)
    card.send(frame(b"echo"))
    card.settle()
    assert card.memory.read(address + 12, 18) == frame(b"echo")


def test_a_loopback_that_nobody_reads_drops_what_is_over_its_limit(make_card: Callable[..., Card]) -> None:
    card = make_card(LOOPBACK)
    address = card.memory.allocate(60012)
    fit = LOOPBACK_BUFFER // (4 + 60012)
    for _ in range(fit + 1):
        card.tx.add([(address, 60012, False)])
        card.settle()
        card.tx.used()
    assert (card.counter("tx_frames"), card.counter("tx_dropped")) == (fit, 1)


def test_a_loopback_that_was_full_takes_frames_again_once_a_quarter_is_read(
    make_card: Callable[..., Card],
) -> None:
    card = make_card(LOOPBACK)
    sent = LOOPBACK_BUFFER // (4 + 12 + 14 + 60000)
    for n in range(sent + 1):
        card.memory.write(card.memory.iova + (4 << 20), NO_HEADER + frame(n.to_bytes(4, "big") * 15000))
        card.tx.add([(card.memory.iova + (4 << 20), 12 + 14 + 60000, False)])
        card.settle()
        card.tx.used()
    assert card.counter("tx_dropped") == 1
    room = card.memory.iova + (5 << 20)
    got = []
    for n in range(sent + 1):
        card.rx.add([(room, 61000, True)])
        if n == sent // 2:
            card.send(frame(b"last"))
        card.settle()
        assert len(card.rx.used()) == 1
        got.append(card.memory.read(room + 12 + 14, 4))
    assert got == [n.to_bytes(4, "big") for n in range(sent)] + [b"last"]


# --- trouble, and what is waited for in it


def break_queue(card: Card) -> None:
    for ring in (card.rx, card.tx):
        card.memory.write(ring.driver + 2, (999).to_bytes(2, "little"))


def disable_queue(card: Card) -> None:
    for queue in (card.path.rx, card.path.tx):
        queue.disable()


def unmap_queue(card: Card) -> None:
    card.dma.unmap_all()


@pytest.mark.parametrize("spoil", [break_queue, disable_queue, unmap_queue])
def test_a_queue_that_takes_nothing_does_not_wake_the_worker_for_what_the_port_has(
    card: Card, spoil: Callable[[Card], None]
) -> None:
    card.offer(100, 100)
    card.network.send(frame())
    card.settle()
    assert card.path.awaited == select.POLLIN
    spoil(card)
    for _ in range(2):  # a buffer that the card knows of already may still be used
        card.network.send(frame())
        card.settle()
    assert card.path.awaited == 0


def test_a_transmit_queue_that_breaks_while_the_port_is_full_does_not_wait_for_room(
    make_card: Callable[..., Card],
) -> None:
    card = make_card(STREAM)
    card.port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for _ in range(12):
        card.send(frame(bytes(60000)))
    card.settle()
    assert card.path.awaited == select.POLLOUT
    break_queue(card)
    received = 0
    for _ in range(100000):
        card.settle()
        try:
            received += len(card.network.recv(1 << 20))
        except BlockingIOError:
            break
    assert received == card.counter("tx_frames") * (4 + 14 + 60000)
    assert not card.path.awaited & select.POLLOUT


def test_each_trouble_is_reported_though_another_was_before(card: Card) -> None:
    card.tx.add([(0x900000000, 100, False)])
    card.settle()
    assert os.eventfd_read(card.path.event_fd) == 1
    card.offer(100)
    card.network.close()
    card.settle()
    assert card.path.port_lost
    assert os.eventfd_read(card.path.event_fd) == 1
    card.settle()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(card.path.event_fd)


@pytest.mark.parametrize("framing", [PACKETS, STREAM])
def test_frames_that_are_none_count_for_the_burst(make_card: Callable[..., Card], framing: int) -> None:
    card = make_card(framing)
    card.offer(100)
    for _ in range(BURST):
        card.network.send(bytes(4) if framing == STREAM else b"x")
    card.network.send(struct.pack("!I", 15) * (framing == STREAM) + frame(b"x"))
    assert card.path.service()
    assert (card.counter("rx_dropped"), card.counter("rx_frames")) == (BURST, 0)
    card.settle()
    assert card.counter("rx_frames") == 1


def test_rings_that_come_with_a_window_are_served_at_once(card: Card) -> None:
    fired = os.eventfd(0)
    card.lines.vector_arm(0, fired)
    card.dma.on_map = card.path.windows_changed
    card.offer(100)
    with card.path.gate:
        card.dma.unmap_all()
    card.network.send(frame())
    worker = threading.Thread(target=card.path.run)
    worker.start()
    while card.path.awaited:
        os.sched_yield()
    with card.path.gate:
        card.memory.map_into(card.dma)
    os.eventfd_read(fired)
    card.path.stop()
    worker.join(10)
    card.dma.on_map = None
    assert len(card.rx.used()) == 1
    os.close(fired)


# --- the worker


def test_the_worker_serves_kicks_and_the_port_and_stops(card: Card) -> None:
    fired = os.eventfd(0)
    card.lines.vector_arm(1, fired)
    worker = threading.Thread(target=card.path.run)
    worker.start()
    for n in range(50):
        card.send(frame(bytes([n])))
        card.path.kick()
        os.eventfd_read(fired)
        assert card.network.recv(2000) == frame(bytes([n]))
    card.path.stop()
    worker.join(10)
    assert not worker.is_alive()
    os.close(fired)


def test_a_halted_data_path_leaves_the_queues_alone(card: Card) -> None:
    card.send(frame())
    card.path.halt()
    card.settle()
    assert card.tx.used() == []


@pytest.mark.parametrize(("framing", "header"), [(3, 0), (0, 10)])
def test_an_unknown_kind_of_port_is_refused(card: Card, framing: int, header: int) -> None:
    with pytest.raises(ValueError, match=r"framing|header"):
        card.path.attach(-1, framing, header)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_the_driver_writes_the_data_path_survives(data: st.DataObject) -> None:
    card = Card(
        data.draw(st.sampled_from([PACKETS, STREAM, LOOPBACK])), mergeable=data.draw(st.booleans()), size=8
    )
    try:
        card.offer(200, 20)
        card.send(frame())
        for _ in range(data.draw(st.integers(1, 12))):
            at = data.draw(st.integers(card.memory.iova, card.memory.iova + 0x400))
            card.memory.write(at, data.draw(st.binary(min_size=1, max_size=16)))
            for _ in range(100):
                if not card.path.service():
                    break
    finally:
        card.close()
