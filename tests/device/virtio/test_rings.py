"""Rings that only the client reaches, and what may happen to a queue while it is asked."""

import errno
import os
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device._gate import Gate
from device.dma import DmaWindows
from device.errors import DeviceError
from device.virtio._split import VirtQueue
from device.virtio.chain import DescriptorChain
from device.virtio.faults import FAULTS
from tests.device.driver_side import INDIRECT, DriverRing, GuestMemory, guest_memory
from tests.device.remote_side import PAGE, Ask, Client, client_of, map_by_message

ENTRY = 8  # bytes of a used ring's


class World:
    def __init__(self, memory: GuestMemory, client: Client, *, event_index: bool = False) -> None:
        self.memory, self.client, self.gate = memory, client, Gate()
        self.dma = DmaWindows()
        self.dma.gate = self.gate
        map_by_message(self.dma, client)
        self.ring = DriverRing(memory, 8)
        self.queue = VirtQueue(self.dma, 0, 8)
        self.event_index = event_index
        self.enable()

    def enable(self) -> None:
        self.queue.enable(8, *self.ring.addresses, event_index=self.event_index, indirect=True)

    def add(self, data: bytes = b"data") -> int:
        address = self.memory.allocate(len(data))
        self.memory.write(address, data)
        return self.ring.add([(address, len(data), False)])

    def begin_at(self, index: int) -> None:
        self.queue.restore(index, index)
        self.ring.avail_index = self.ring.used_seen = index
        for ring in (self.ring.driver, self.ring.device):
            self.memory.write(ring + 2, index.to_bytes(2, "little"))

    def pop(self) -> DescriptorChain:
        chain = self.queue.pop()
        assert chain is not None
        return chain

    def meanwhile(self, action: Callable[[], object], *, to: int, kind: str = "read") -> None:
        """While the client is asked for what lies at `to`, a control thread does this, once."""

        def act(ask: Ask) -> None:
            if ask[:2] == (kind, to):
                self.client.meanwhile = lambda _: None
                with self.gate:
                    action()

        self.client.meanwhile = act


@pytest.fixture
def world() -> Iterator[World]:
    with guest_memory() as memory, client_of(memory) as client:
        yield World(memory, client)


def refuse(number: int) -> Callable[[Ask], None]:
    def meanwhile(_: Ask) -> None:
        raise DeviceError(number, "no")

    return meanwhile


def refusal(call: Callable[..., object], *args: object) -> int:
    with pytest.raises(DeviceError) as refused:
        call(*args)
    assert refused.value.errno is not None
    return refused.value.errno


def test_a_burst_of_chains_is_fetched_at_once(world: World) -> None:
    for _ in range(5):
        world.add()
    chains = [world.queue.pop() for _ in range(5)]
    assert None not in chains
    descriptors, driver, _ = world.ring.addresses
    assert world.client.asked == [
        ("read", driver + 2, 2),
        ("read", driver + 4, 2 * 5),
        ("read", descriptors, 16 * 8),
    ]


def test_a_burst_that_wraps_is_fetched_in_two_parts(world: World) -> None:
    world.begin_at(6)
    heads = [world.add() for _ in range(4)]
    assert [chain.head for chain in iter(world.queue.pop, None)] == heads


def test_an_indirect_table_is_fetched_at_once(world: World) -> None:
    parts = [(world.memory.allocate(4), 4, False) for _ in range(20)]
    world.ring.add_indirect(parts)
    chain = world.pop()
    assert len(chain.readable) == 20
    assert len(world.client.asked) == 4


# --- refusals


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EACCES])
def test_a_client_that_refuses_its_rings_breaks_the_queue(world: World, number: int) -> None:
    world.add()
    world.client.meanwhile = refuse(number)
    assert refusal(world.queue.pop) == errno.EIO
    assert world.queue.fault == FAULTS[10]
    assert world.queue.fault_number == 10
    assert refusal(world.queue.pop) == errno.EIO
    assert len(world.client.asked) == 1


def test_a_client_that_refuses_a_completion_breaks_the_queue(world: World) -> None:
    world.add()
    chain = world.pop()
    world.client.meanwhile = refuse(errno.EIO)
    assert refusal(world.queue.push, chain) == errno.EIO
    assert world.queue.fault == FAULTS[10]


def test_an_indirect_table_that_is_refused_breaks_the_queue(world: World) -> None:
    world.ring.add_indirect([(world.memory.iova, 4, False)])

    def meanwhile(ask: Ask) -> None:
        if ask[2] == 16:
            raise DeviceError(errno.EIO, "no")

    world.client.meanwhile = meanwhile
    assert refusal(world.queue.pop) == errno.EIO
    assert world.queue.fault == FAULTS[7]


def test_a_client_that_is_gone_leaves_a_queue_that_waits(world: World) -> None:
    head = world.add()
    world.client.meanwhile = refuse(errno.ENOTCONN)
    assert refusal(world.queue.pop) == errno.ECANCELED
    assert world.queue.pop() is None
    assert world.queue.fault is None
    assert len(world.client.asked) == 1
    world.client.meanwhile = lambda _: None
    world.dma.remote = world.client
    chain = world.pop()
    assert chain.head == head


def test_a_lie_about_a_length_breaks_the_queue(world: World) -> None:
    world.add()
    world.client.answer = lambda data: data + b"\0"
    assert refusal(world.queue.pop) == errno.EIO


def test_rings_that_are_taken_away_meanwhile_are_waited_for(world: World) -> None:
    world.add()
    world.meanwhile(lambda: world.dma.unmap(world.memory.iova, world.memory.size), to=world.ring.driver + 2)
    with world.gate:
        assert refusal(world.queue.pop) == errno.ECANCELED
        assert world.queue.pop() is None
    assert world.queue.fault is None
    world.memory.map_into(world.dma)
    assert world.queue.pop() is not None


def test_rings_that_the_client_truncates_are_looked_at_no_more() -> None:
    """Half of them are in its file and half are asked for, so that nothing but the file tells."""
    dma = DmaWindows()
    with guest_memory() as memory, client_of(memory) as client:
        map_by_message(dma, client, every=2)
        memory.allocate(4096)
        ring = DriverRing(memory, 8)
        ring.device = memory.iova
        queue = VirtQueue(dma, 0, 8)
        queue.enable(8, *ring.addresses)
        assert queue.pop() is None
        os.ftruncate(memory.fd, 0)
        results = []
        for _ in range(10):
            try:
                results.append(queue.pop())
            except DeviceError as error:
                assert error.errno == errno.ECANCELED
        assert len(results) > 7
        assert set(results) == {None}
        assert queue.fault is None


@pytest.mark.parametrize("gone", ["all", "descriptors", "index"])
def test_what_is_read_of_rings_that_are_truncated_just_then_is_nothing(gone: str) -> None:
    """They are in this process, in one piece."""
    dma = DmaWindows()
    with guest_memory(dma) as memory:
        ring = DriverRing(memory, 8)
        buffer = memory.allocate(16), 16, True
        if gone == "descriptors":
            ring.descriptors = memory.iova + 16 * PAGE
        elif gone == "index":
            ring.driver = memory.iova + 16 * PAGE
        queue = VirtQueue(dma, 0, 8)
        queue.enable(8, *ring.addresses)
        for _ in range(3):
            ring.add([buffer])
        assert queue.pop() is not None
        os.ftruncate(memory.fd, 0 if gone == "all" else 16 * PAGE)
        assert refusal(queue.pop) == errno.ECANCELED
        assert queue.pop() is None
        assert queue.fault is None


def test_an_indirect_table_that_is_truncated_breaks_the_queue_and_makes_no_chain() -> None:
    dma = DmaWindows()
    with guest_memory(dma) as memory, guest_memory(dma, iova=0x1000000) as other:
        ring = DriverRing(memory, 8)
        queue = VirtQueue(dma, 0, 8)
        queue.enable(8, *ring.addresses, indirect=True)
        index, table = ring.free.pop(), other.iova
        other.write(table, struct.pack("<QIHH", memory.allocate(16), 16, 0, 0))
        ring.set_descriptor(index, table, 16, INDIRECT)
        ring.make_available(index)
        os.ftruncate(other.fd, 0)
        assert refusal(queue.pop) == errno.ECANCELED
        assert refusal(queue.pop) == errno.EIO
        assert queue.fault == FAULTS[7]


# --- the queue becomes another one


@pytest.mark.parametrize("where", ["index", "entries", "descriptors"])
def test_a_reset_while_rings_are_read_leaves_a_queue_as_after_any_reset(world: World, where: str) -> None:
    world.add()
    descriptors, driver, _ = world.ring.addresses
    at = {"index": driver + 2, "entries": driver + 4, "descriptors": descriptors}[where]
    world.meanwhile(world.queue.reset, to=at)
    with world.gate:
        assert refusal(world.queue.pop) == errno.ECANCELED
    assert (world.queue.last_avail, world.queue.used_index, world.queue.fault) == (0, 0, None)
    assert world.queue.pop() is None
    world.enable()
    assert world.queue.pop() is not None


@pytest.mark.parametrize("where", ["entry", "index", "flags"])
def test_a_reset_while_a_completion_is_written_forgets_it(world: World, where: str) -> None:
    world.add()
    chain = world.pop()
    _, driver, device = world.ring.addresses
    kind, at = {"entry": ("write", device + 4), "index": ("write", device + 2), "flags": ("read", driver)}[
        where
    ]
    world.meanwhile(world.queue.reset, to=at, kind=kind)
    with world.gate:
        assert refusal(world.queue.push, chain) == errno.ECANCELED
    world.client.asked.clear()
    world.enable()
    assert not world.queue.settle()
    assert not world.queue.push(chain)
    assert world.client.asked == []


def test_a_chain_of_rings_that_were_taken_away_is_not_handed_back(world: World) -> None:
    world.add()
    old = world.pop()
    world.queue.reset()
    world.enable()
    assert not world.queue.push(old)
    assert world.ring.used() == []


@pytest.mark.parametrize("event_index", [False, True])
@pytest.mark.parametrize("where", ["entry", "index", "flags"])
def test_a_completion_that_was_interrupted_is_finished_once(where: str, event_index: bool) -> None:
    with guest_memory() as memory, client_of(memory) as client:
        world = World(memory, client, event_index=event_index)
        head = world.add()
        chain = world.pop()
        _, driver, device = world.ring.addresses
        kind, at = {
            "entry": ("write", device + 4),
            "index": ("write", device + 2),
            "flags": ("read", driver + (20 if event_index else 0)),
        }[where]
        world.meanwhile(world.dma.disturb, to=at, kind=kind)
        with world.gate:
            assert refusal(world.queue.push, chain, 3) == errno.ECANCELED
            assert world.queue.settle()
            assert not world.queue.settle()
        assert world.ring.used() == [(head, 3)]


def test_a_disabled_queue_tells_where_another_has_to_go_on(world: World) -> None:
    for _ in range(3):
        world.add()
    done, _ = world.pop(), world.pop()
    world.queue.push(done)
    assert world.queue.last_avail == 1  # the second is popped, and not done with
    world.meanwhile(world.queue.disable, to=world.ring.device + 4 + ENTRY, kind="write")
    second = world.pop()
    with world.gate:
        assert refusal(world.queue.push, second) == errno.ECANCELED
    assert (world.queue.last_avail, world.queue.used_index) == (1, 1)
    assert world.queue.owed_list() == [(second.head, 0)]


def test_completions_that_are_owed_go_on_in_another_queue(world: World) -> None:
    heads = [world.add() for _ in range(3)]
    first = world.pop()
    world.meanwhile(world.dma.disturb, to=world.ring.device + 4, kind="write")
    with world.gate:
        assert refusal(world.queue.push, first, 9) == errno.ECANCELED
    saved = world.queue.last_avail, world.queue.used_index
    owed = world.queue.owed_list()
    other = VirtQueue(world.dma, 0, 8)
    other.enable(8, *world.ring.addresses)
    other.restore(*saved)
    other.owe_again(owed)
    assert other.settle()
    assert world.ring.used() == [(heads[0], 9)]
    following = other.pop()
    assert following is not None
    assert following.head == heads[1]


def test_a_fault_that_is_none_is_not_restored(world: World) -> None:
    with pytest.raises(ValueError, match="fault 77"):
        world.queue.restore(0, 0, 77)
    world.queue.restore(0, 0, 3)
    assert world.queue.fault == FAULTS[3]


@settings(max_examples=300, deadline=None)
@given(
    disturbances=st.lists(st.booleans(), max_size=60),
    pauses=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    event_index=st.booleans(),
    start=st.sampled_from([0, 5, 0xFFFE]),
)
def test_whatever_disturbs_it_each_chain_is_served_once_and_in_order(
    disturbances: list[bool], pauses: list[int], event_index: bool, start: int
) -> None:
    with guest_memory() as memory, client_of(memory) as client:
        world = World(memory, client, event_index=event_index)
        world.begin_at(start)
        coming = iter(disturbances)
        sent: list[int] = []
        served: list[bytes] = []
        completed: list[tuple[int, int]] = []

        def meanwhile(_: Ask) -> None:
            if next(coming, False):
                with world.gate:
                    world.dma.disturb()

        def serve_all() -> None:
            while (chain := world.queue.pop()) is not None:
                content = chain.read()
                served.append(content)
                world.queue.push(chain, len(content))

        client.meanwhile = meanwhile
        for pause in pauses:
            sent.append(world.add(b"%d" % len(sent)))
            for _ in range(pause):
                try:
                    with world.gate:
                        world.queue.settle()
                        serve_all()
                except DeviceError as error:
                    assert error.errno == errno.ECANCELED
                    world.queue.give_chains_back()
            completed += world.ring.used()
            if not world.ring.free:
                break
        disturbances.clear()
        client.meanwhile = lambda _: None
        world.queue.settle()
        serve_all()
        completed += world.ring.used()
        assert [head for head, _ in completed] == sent
        assert served == [b"%d" % n for n in range(len(sent))]
