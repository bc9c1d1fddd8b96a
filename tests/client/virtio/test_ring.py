"""The driver's rings against a device's side written from the spec."""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from client.errors import ClientError, DeviceError
from client.virtio._ring import MAX_SIZE, ReceiveRing, Ring, TransmitRing, ring_layout
from tests.client.virtio.ring_device import Chain, RingDevice

IOVA = 0x7000_0000
SLOTS = 0x10000
SLOT = 64
HEADER = bytes(range(10)) + b"\1\0"
BOTH = pytest.mark.parametrize("event_index", [False, True], ids=["flags", "event index"])


class World:
    """Memory with a ring at its start and slots at SLOTS."""

    def __init__(
        self, kind: type[Any] = Ring, size: int = 8, *, event_index: bool = True, **options: Any
    ) -> None:
        self.memory = memoryview(mmap.mmap(-1, SLOTS + size * SLOT))
        if kind is not Ring:
            options = {
                "slots": self.memory[SLOTS:],
                "slots_iova": IOVA + SLOTS,
                "slot_size": SLOT,
                **options,
            }
        self.ring: Any = kind(self.memory[:SLOTS], IOVA, size, event_index=event_index, **options)
        self.device = RingDevice(
            self.memory,
            IOVA,
            size,
            self.ring.descriptor_iova,
            self.ring.driver_iova,
            self.ring.device_iova,
            event_index=event_index,
        )

    def deliver(self, *frames: bytes) -> bool:
        """Let the device write frames into the buffers it has, as many for each as it needs; whether to
        interrupt.
        """
        chains = deque(self.device.take())
        given: list[tuple[Chain, int]] = []
        for frame in frames:
            pieces = [
                (HEADER[:10] + b"\0\0" + frame)[at : at + SLOT] for at in range(0, 12 + len(frame), SLOT)
            ]
            pieces[0] = pieces[0][:10] + struct.pack("<H", len(pieces)) + pieces[0][12:]
            for piece in pieces:
                chain = chains.popleft()
                given.append((chain, self.device.write(chain, piece)))
        self.device.seen = (self.device.seen - len(chains)) % 65536
        return self.device.give(*given)


# layout


@pytest.mark.parametrize("size", [1, 2, 256, MAX_SIZE])
def test_the_parts_of_a_ring_are_aligned_and_do_not_overlap(size: int) -> None:
    total, driver, device = ring_layout(size)
    assert driver >= 16 * size
    assert driver % 2 == 0
    assert device >= driver + 6 + 2 * size
    assert device % 4 == 0
    assert total >= device + 6 + 8 * size


@pytest.mark.parametrize("size", [0, 3, 65536, -4])
def test_sizes_that_the_spec_excludes_are_refused(size: int) -> None:
    with pytest.raises(ClientError):
        ring_layout(size)


def test_memory_that_is_too_small_is_refused() -> None:
    with pytest.raises(ClientError, match="needs"):
        Ring(bytearray(100), IOVA, 8)
    with pytest.raises(ClientError, match="do not fit"):
        ReceiveRing(bytearray(4096), IOVA, 8, slots=bytearray(511), slots_iova=0, slot_size=64)
    with pytest.raises(ClientError, match="no room"):
        TransmitRing(bytearray(4096), IOVA, 8, slots=bytearray(512), slots_iova=0, slot_size=12)


def test_read_only_memory_is_refused() -> None:
    with pytest.raises(BufferError):
        Ring(bytes(4096), IOVA, 8)


# chains


@BOTH
def test_a_chain_arrives_as_it_was_offered_and_comes_back_with_its_token(event_index: bool) -> None:
    world = World(event_index=event_index)
    token = object()
    assert world.ring.add([(0x1000, 2), (0x2000, 6)], [(0x3000, 1)], token)
    assert world.device.take() == []
    assert world.ring.publish()
    (chain,) = world.device.take()
    assert chain.readable == [(0x1000, 2), (0x2000, 6)]
    assert chain.writable == [(0x3000, 1)]
    assert not world.ring.pending
    world.device.give((chain, 1))
    assert world.ring.pending
    assert world.ring.collect() == [(token, 1)]
    assert world.ring.free == 8
    assert world.ring.outstanding == 0


def test_a_chain_that_does_not_fit_is_not_offered() -> None:
    world = World()
    assert world.ring.add([(0, 1)] * 5, [], "a")
    assert not world.ring.add([(0, 1)] * 4, [], "b")
    assert world.ring.add([(0, 1)] * 2, [(0, 1)], "c")
    assert world.ring.free == 0
    world.ring.publish()
    assert [len(chain.readable) for chain in world.device.take()] == [5, 2]


def test_a_chain_needs_a_buffer_and_a_token() -> None:
    with pytest.raises(ClientError):
        World().ring.add([], [], "token")
    with pytest.raises(ClientError):
        World().ring.add([(0, 1)], [], None)


@BOTH
def test_chains_may_come_back_in_any_order(event_index: bool) -> None:
    world = World(event_index=event_index)
    for token in "abcd":
        world.ring.add([(ord(token), 1)], [(0, 1)], token)
    world.ring.publish()
    chains = world.device.take()
    world.device.give((chains[2], 3), (chains[0], 1))
    world.device.give((chains[3], 4), (chains[1], 2))
    assert world.ring.collect() == [("c", 3), ("a", 1), ("d", 4), ("b", 2)]


# who is told when


@BOTH
def test_the_device_is_notified_only_if_it_wants_to_be(event_index: bool) -> None:
    world = World(event_index=event_index)
    world.ring.add([(0, 1)], [], 1)
    assert world.ring.publish()
    assert not world.ring.publish()
    world.device.take()
    world.device.want_notifications(False)
    world.ring.add([(0, 1)], [], 2)
    assert not world.ring.publish()
    world.device.take()
    world.device.want_notifications(True)
    world.ring.add([(0, 1)], [], 3)
    assert world.ring.publish()


def test_a_burst_crosses_the_device_s_event_index_once() -> None:
    world = World(size=32)
    for token in range(10):
        world.ring.add([(0, 1)], [], token + 1)
    assert world.ring.publish()
    for token in range(10):
        world.ring.add([(0, 1)], [], token + 1)
    assert not world.ring.publish()


@BOTH
def test_interrupts_come_only_if_wanted(event_index: bool) -> None:
    world = World(event_index=event_index)
    for token in range(1, 9):
        world.ring.add([(0, 1)], [], token)
    world.ring.publish()
    chains = world.device.take()
    world.ring.disable_interrupts()
    assert not world.device.give((chains[0], 0))
    world.ring.collect()
    assert not world.ring.enable_interrupts()
    assert world.device.give((chains[1], 0))


def test_an_interrupt_can_wait_for_several() -> None:
    world = World()
    for token in range(1, 9):
        world.ring.add([(0, 1)], [], token)
    world.ring.publish()
    chains = world.device.take()
    assert not world.ring.enable_interrupts(4)
    assert [world.device.give((chain, 0)) for chain in chains[:5]] == [False, False, False, True, False]


@BOTH
def test_what_came_before_interrupts_were_enabled_is_told(event_index: bool) -> None:
    world = World(event_index=event_index)
    world.ring.add([(0, 1)], [], 1)
    world.ring.publish()
    world.ring.disable_interrupts()
    world.device.give((world.device.take()[0], 0))
    assert world.ring.enable_interrupts()


# a device that lies


@pytest.mark.parametrize("head", [8, 0xFFFF, 0x10000, 5])
def test_a_used_entry_for_nothing_is_the_device_s_fault(head: int) -> None:
    world = World()
    world.ring.add([(0, 1)], [], 1)
    world.ring.publish()
    world.device.give((head, 0))
    with pytest.raises(DeviceError, match="no chain"):
        world.ring.collect()


def test_a_chain_that_comes_back_twice_is_the_device_s_fault() -> None:
    world = World()
    world.ring.add([(0, 1)], [], 1)
    world.ring.publish()
    (chain,) = world.device.take()
    world.device.give((chain, 0))
    world.ring.collect()
    world.device.give((chain, 0))
    with pytest.raises(DeviceError, match="no chain"):
        world.ring.collect()


def test_a_used_index_that_runs_ahead_is_the_device_s_fault() -> None:
    world = World()
    world.device.put16(world.device.device + 2, 9)
    for call in (world.ring.collect, world.ring.enable_interrupts, lambda: world.ring.pending):
        with pytest.raises(DeviceError, match="9 ahead"):
            call()


def test_what_the_device_writes_into_descriptors_does_not_matter() -> None:
    world = World()
    world.ring.add([(0, 1)] * 3, [], 1)
    world.ring.publish()
    (chain,) = world.device.take()
    world.device.at(world.device.descriptors, 16 * 8)[:] = b"\xff" * 128
    world.device.give((chain, 0))
    assert world.ring.collect() == [(1, 0)]
    assert world.ring.free == 8


def test_a_released_ring_refuses_everything() -> None:
    world = World(TransmitRing)
    world.ring.release()
    world.ring.release()
    for call in (world.ring.publish, world.ring.collect, world.ring.reap, world.ring.enable_interrupts):
        with pytest.raises(ClientError, match="released"):
            call()
    with pytest.raises(ClientError, match="released"):
        world.ring.push([b"frame"])


# frames out


@BOTH
def test_frames_arrive_with_a_header_of_zeros(event_index: bool) -> None:
    world = World(TransmitRing, event_index=event_index)
    assert world.ring.push([b"one", bytearray(b"two"), memoryview(b"three"), b""]) == 4
    assert world.ring.publish()
    chains = world.device.take()
    assert [world.device.read(chain) for chain in chains] == [
        bytes(12) + frame for frame in (b"one", b"two", b"three", b"")
    ]
    assert not any(chain.writable for chain in chains)


def test_a_frame_may_have_a_header_of_its_own() -> None:
    world = World(TransmitRing)
    world.ring.push([b"frame"], 0, HEADER)
    world.ring.publish()
    assert world.device.read(world.device.take()[0]) == HEADER + b"frame"
    with pytest.raises(ClientError, match="12 bytes"):
        world.ring.push([b"frame"], 0, b"short")


@pytest.mark.parametrize("length", [0, 1, 51, 52, 53, 64 + 52, 64 + 53, 8 * 64 - 12])
def test_a_long_frame_lies_in_several_slots(length: int) -> None:
    world = World(TransmitRing)
    frame = os.urandom(length)
    assert world.ring.push([frame]) == 1
    world.ring.publish()
    (chain,) = world.device.take()
    assert world.device.read(chain) == bytes(12) + frame
    assert len(chain.readable) == world.ring.slots_for(length)
    assert world.ring.free == 8 - len(chain.readable)
    world.device.give((chain, 0))
    assert world.ring.reap() == 1
    assert world.ring.free == 8


def test_a_frame_that_never_fits_is_refused() -> None:
    world = World(TransmitRing)
    with pytest.raises(ClientError, match="does not fit"):
        world.ring.push([bytes(8 * 64 - 11)])
    with pytest.raises(ClientError, match="does not fit"):
        world.ring.repeat(bytes(1000), 1)


def test_frames_before_the_first_are_refused() -> None:
    with pytest.raises(ClientError, match="counted from 0"):
        World(TransmitRing).ring.push([b"frame"], -1)


def test_a_full_ring_takes_the_rest_later() -> None:
    world = World(TransmitRing)
    frames = [bytes([number]) for number in range(20)]
    assert world.ring.push(frames) == 8
    world.ring.publish()
    assert world.ring.push(frames, 8) == 0
    chains = world.device.take()
    world.device.give(*((chain, 0) for chain in chains[:3]))
    assert world.ring.push(frames, 8) == 3
    world.ring.publish()
    assert [world.device.read(chain)[12:] for chain in world.device.take()] == frames[8:11]
    assert world.ring.push(frames, 20) == 0


def test_the_same_frame_can_be_sent_many_times() -> None:
    world = World(TransmitRing)
    assert world.ring.repeat(b"again", 5) == 5
    assert world.ring.repeat(b"again", 5) == 3
    world.ring.publish()
    assert {world.device.read(chain) for chain in world.device.take()} == {bytes(12) + b"again"}


# frames in


@BOTH
def test_all_buffers_are_offered_from_the_beginning(event_index: bool) -> None:
    world = World(ReceiveRing, event_index=event_index)
    assert world.ring.publish()
    chains = world.device.take()
    assert sorted(chain.writable[0] for chain in chains) == [
        (IOVA + SLOTS + SLOT * slot, SLOT) for slot in range(8)
    ]


@BOTH
def test_frames_come_out_in_order_and_their_buffers_are_offered_again(event_index: bool) -> None:
    world = World(ReceiveRing, event_index=event_index)
    world.ring.publish()
    for turn in range(10):
        frames = [bytes([turn, number]) * 5 for number in range(6)]
        world.deliver(*frames)
        assert world.ring.pop(4) == frames[:4]
        assert world.ring.pop(4) == frames[4:]
        assert world.ring.pop() == []
        world.ring.publish()
        assert world.ring.outstanding == 8


def test_headers_come_along_if_asked_for() -> None:
    world = World(ReceiveRing)
    world.ring.publish()
    world.deliver(b"frame")
    assert world.ring.pop_with_headers() == [(HEADER, b"frame")]


def test_a_frame_over_several_buffers_is_put_together() -> None:
    world = World(ReceiveRing, mergeable=True)
    world.ring.publish()
    frame = os.urandom(300)
    world.deliver(b"small", frame)
    assert world.ring.pop() == [b"small", frame]
    world.ring.publish()
    assert world.ring.outstanding == 8


def test_a_frame_whose_buffers_are_not_all_there_yet_waits() -> None:
    world = World(ReceiveRing, mergeable=True)
    world.ring.publish()
    first, second = world.device.take()[:2]
    world.device.write(first, bytes(10) + b"\2\0" + b"x" * 52)
    world.device.write(second, b"yz")
    world.device.give((first, 64))
    assert world.ring.pop() == []
    world.device.give((second, 2))
    assert world.ring.pop() == [b"x" * 52 + b"yz"]


def test_frames_can_be_thrown_away_and_counted() -> None:
    world = World(ReceiveRing, mergeable=True)
    world.ring.publish()
    world.deliver(b"abc", bytes(100), b"")
    assert world.ring.drain() == (3, 103)
    assert world.ring.drain() == (0, 0)
    world.ring.publish()
    assert world.ring.outstanding == 8


@pytest.mark.parametrize(
    ("header", "written"),
    [(HEADER, 11), (HEADER, 65), (HEADER, 0xFFFF_FFFF), (bytes(12), 12), (b"\xff" * 12, 12)],
)
def test_lengths_that_cannot_be_are_the_device_s_fault(header: bytes, written: int) -> None:
    for call in ("pop", "drain"):
        world = World(ReceiveRing, mergeable=True)
        world.ring.publish()
        chain = world.device.take()[0]
        world.device.write(chain, header)
        world.device.give((chain, written))
        with pytest.raises(DeviceError):
            getattr(world.ring, call)()


# everything together


class Traffic(RuleBasedStateMachine):
    """Frames to and from a device that takes its time; a plain list each way is the model."""

    def __init__(self) -> None:
        super().__init__()
        self.out = World(TransmitRing, size=8)
        self.into = World(ReceiveRing, size=8, mergeable=True)
        self.into.ring.publish()
        self.sent: list[bytes] = []
        self.seen: list[bytes] = []
        self.held: list[Chain] = []
        self.buffers: deque[Chain] = deque()
        self.delivered: list[bytes] = []
        self.received: list[bytes] = []

    @rule(frames=st.lists(st.binary(max_size=200), max_size=6))
    def send(self, frames: list[bytes]) -> None:
        self.sent += frames[: self.out.ring.push(frames)]
        self.out.ring.publish()

    @rule()
    def device_takes(self) -> None:
        chains = self.out.device.take()
        self.seen += [self.out.device.read(chain)[12:] for chain in chains]
        self.held += chains

    @rule(data=st.data())
    def device_gives_back(self, data: st.DataObject) -> None:
        if self.held:
            self.out.device.give((self.held.pop(data.draw(st.integers(0, len(self.held) - 1))), 0))

    @rule(frame=st.binary(max_size=200))
    def device_delivers(self, frame: bytes) -> None:
        self.buffers += self.into.device.take()
        pieces = [(bytes(12) + frame)[at : at + SLOT] for at in range(0, 12 + len(frame), SLOT)]
        if len(pieces) > len(self.buffers):
            return
        pieces[0] = bytes(10) + struct.pack("<H", len(pieces)) + pieces[0][12:]
        given = []
        for piece in pieces:
            chain = self.buffers.popleft()
            given.append((chain, self.into.device.write(chain, piece)))
        self.into.device.give(*given)
        self.delivered.append(frame)

    @rule(limit=st.integers(1, 4))
    def receive(self, limit: int) -> None:
        self.received += self.into.ring.pop(limit)
        self.into.ring.publish()

    @invariant()
    def nothing_is_lost_doubled_or_changed(self) -> None:
        assert self.sent[: len(self.seen)] == self.seen
        assert self.delivered[: len(self.received)] == self.received
        assert self.out.ring.free + sum(len(chain.readable) for chain in self.held) <= 8

    def teardown(self) -> None:
        self.device_takes()
        assert self.seen == self.sent
        self.received += self.into.ring.pop(100)
        assert self.received == self.delivered
        self.out.device.give(*((chain, 0) for chain in self.held))
        self.out.ring.reap()
        assert self.out.ring.free == 8


TestTraffic = Traffic.TestCase


def test_a_ring_works_on_after_65536_frames() -> None:
    world = World(TransmitRing, size=256)
    sent = 0
    while sent < 66000:
        sent += world.ring.repeat(b"x", 256)
        world.ring.publish()
        chains = world.device.take()
        assert len(chains) == 256
        world.device.give(*((chain, 0) for chain in chains))
    world.ring.push([b"after"])
    assert world.ring.publish()
    assert world.device.read(world.device.take()[0])[12:] == b"after"
