"""Chains in flight: what is popped through Python is pinned until it is pushed or given back."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from device.dma import DmaWindows, PinCounters, PinnedError
from device.errors import DeviceError
from device.virtio._split import VirtQueue
from tests.device.driver_side import DriverRing, GuestMemory, guest_memory
from tests.device.remote_side import PAGE, client_of, map_by_message

BUFFERS = 0x400000


class World:
    """A queue with rings at 0x10000, and buffers in a window of their own."""

    def __init__(self, memory: GuestMemory) -> None:
        self.dma = DmaWindows()
        self.memory = memory
        memory.map_into(self.dma)
        self.ring = DriverRing(memory, 8)
        self.queue = VirtQueue(self.dma, 2, 256)
        self.queue.enable(8, *self.ring.addresses)
        self.dma.map(BUFFERS, 4 * PAGE, 3, memory.fd, 0x80000)

    def offer(self, *buffers: tuple[int, int, bool]) -> None:
        self.ring.add(list(buffers))

    def held(self) -> bool:
        """Whether the buffers' window is, which goes if it is not."""
        try:
            self.dma.unmap(BUFFERS, 4 * PAGE)
        except PinnedError as error:
            assert error.holders == "queue 2"
            return True
        return False


@pytest.fixture
def it() -> Iterator[World]:
    with guest_memory() as memory:
        yield World(memory)


def test_a_chain_is_held_from_pop_to_push(it: World) -> None:
    it.offer((BUFFERS, 4, False), (BUFFERS + PAGE, PAGE + 1, True))
    chain = it.queue.pop()
    assert chain is not None
    assert it.dma.pins.counters == PinCounters(3, 0)
    assert it.held()
    it.queue.push(chain, 1)
    assert it.dma.pins.counters == PinCounters(3, 3)
    it.queue.push(chain, 1)
    assert not it.held()


@pytest.mark.parametrize("end", ["give_chains_back", "disable", "reset"])
def test_chains_are_held_until_they_are_given_back_or_the_queue_is_another_one(it: World, end: str) -> None:
    for page in range(3):
        it.offer((BUFFERS + page * PAGE, 4, True))
    chains = [it.queue.pop() for _ in range(3)]
    assert len(it.dma.pins) == 3
    getattr(it.queue, end)()
    assert it.dma.pins.counters == PinCounters(3, 3)
    assert chains[0] is not None
    it.queue.push(chains[0])
    assert not it.held()


def test_a_chain_that_is_pushed_to_a_broken_queue_is_held_no_longer(it: World) -> None:
    it.offer((BUFFERS, 4, True))
    chain = it.queue.pop()
    assert chain is not None
    it.memory.write(it.ring.driver + 2, b"\xff\x7f")
    with pytest.raises(DeviceError):
        it.queue.pop()
    assert it.held()
    assert not it.queue.push(chain)
    assert not it.held()


def test_a_chain_in_no_window_holds_nothing_and_is_popped_all_the_same(it: World) -> None:
    it.offer((BUFFERS, 4, False), (0x900000, 4, True))
    chain = it.queue.pop()
    assert chain is not None
    assert chain.pin is None
    assert not it.held()


def test_a_chain_that_the_client_must_be_asked_for_holds_nothing(it: World) -> None:
    it.dma.map(0x900000, PAGE, 3)
    it.offer((BUFFERS, 4, False), (0x900000, 4, True))
    chain = it.queue.pop()
    assert chain is not None
    assert chain.pin is None


def test_no_chain_is_held_whose_rings_the_client_must_be_asked_for() -> None:
    with guest_memory() as memory, client_of(memory) as client:
        dma = DmaWindows()
        map_by_message(dma, client)
        dma.map(BUFFERS, PAGE, 3, memory.fd, 0)
        ring = DriverRing(memory, 8)
        queue = VirtQueue(dma, 0, 256)
        queue.enable(8, *ring.addresses)
        ring.add([(BUFFERS, 4, True)])
        chain = queue.pop()
        assert chain is not None
        assert chain.pin is None


def test_a_chain_in_what_is_about_to_go_stays_available(it: World) -> None:
    it.offer((BUFFERS, 4, True))
    it.offer((BUFFERS + PAGE, 4, True))
    first = it.queue.pop()
    assert first is not None
    told: list[bool] = []
    with it.dma.pins.leaving(BUFFERS, BUFFERS + 4 * PAGE - 1, lambda: told.append(True)):
        with pytest.raises(DeviceError) as refused:
            it.queue.pop()
        assert refused.value.errno == errno.EAGAIN
        assert it.queue.last_avail == 0
        it.queue.push(first)
        assert told
    second = it.queue.pop()
    assert second is not None
    assert second.head != first.head


def test_a_chain_may_be_held_while_its_memory_is_written_to(it: World) -> None:
    it.offer((BUFFERS, 4, True))
    chain = it.queue.pop()
    assert chain is not None
    assert chain.pin is not None
    assert chain.pin.views == []
    assert chain.write(b"data") == 4
    assert it.dma.read(BUFFERS, 4) == b"data"
