import errno
import random
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.dma import DmaWindows
from device.errors import DeviceError
from device.virtio._split import MAX_CHAIN, MAX_QUEUE_SIZE, VirtQueue
from device.virtio.faults import FAULTS
from tests.device.driver_side import INDIRECT, NEXT, WRITE, DriverRing, GuestMemory, guest_memory
from tests.device.remote_side import PAGE, client_of, map_by_message


class World:
    """A queue of the device and the driver's rings behind it."""

    def __init__(
        self,
        memory: GuestMemory,
        dma: DmaWindows,
        size: int = 8,
        *,
        event_index: bool = False,
        indirect: bool = True,
    ):
        self.memory, self.dma = memory, dma
        self.ring = DriverRing(memory, size)
        self.queue = VirtQueue(dma, 0, 256)
        self.queue.enable(size, *self.ring.addresses, event_index=event_index, indirect=indirect)

    def buffer(self, data: bytes) -> tuple[int, int, bool]:
        address = self.memory.allocate(len(data))
        self.memory.write(address, data)
        return address, len(data), False

    def room(self, length: int) -> tuple[int, int, bool]:
        return self.memory.allocate(length), length, True


@pytest.fixture(params=["mapped", "by message", "in pieces"])
def road(request: pytest.FixtureRequest) -> str:
    """How the device reaches the driver's memory."""
    kind: str = request.param
    return kind


@pytest.fixture
def make_world(road: str) -> Iterator[Callable[..., World]]:
    dma = DmaWindows()
    with guest_memory() as memory, client_of(memory) as client:
        if road == "mapped":
            memory.map_into(dma)
        else:
            map_by_message(dma, client, every=2 if road == "in pieces" else 1)
        memory.allocate(PAGE - 56)  # rings that lie across two pages
        yield lambda *args, **kwargs: World(memory, dma, *args, **kwargs)


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()


def test_a_chain_is_popped_with_what_it_holds_and_pushed_back(world: World) -> None:
    head = world.ring.add([world.buffer(b"hello "), world.buffer(b"world"), world.room(4), world.room(4)])
    chain = world.queue.pop()
    assert chain is not None
    assert chain.head == head
    assert chain.read() == b"hello world"
    assert chain.write(b"answer") == 6
    assert world.queue.push(chain, 6)
    assert world.ring.used() == [(head, 6)]
    assert world.memory.read(chain.writable[1][0], 2) == b"er"
    assert world.queue.pop() is None


def test_more_than_fits_is_cut_off(world: World) -> None:
    world.ring.add([world.room(4)])
    chain = world.queue.pop()
    assert chain is not None
    assert chain.write(b"too long") == 4


def test_an_indirect_table_is_followed(world: World) -> None:
    world.ring.add_indirect([world.buffer(b"a"), world.buffer(b"b"), world.room(1)])
    chain = world.queue.pop()
    assert chain is not None
    assert (chain.read(), len(chain.writable)) == (b"ab", 1)


def test_an_indirect_table_may_lie_at_address_zero_and_has_its_own_end() -> None:
    dma = DmaWindows()
    with guest_memory(dma, iova=0) as memory:
        assert memory.allocate(16 * 32) == 0
        world = World(memory, dma)
        world.ring.add([world.buffer(b"direct")])
        address, length, _ = world.buffer(b"indirect")
        memory.write(0, struct.pack("<QIHH", address, length, NEXT, 31))
        memory.write(16 * 31, struct.pack("<QIHH", address, length, 0, 0))
        world.ring.set_descriptor(5, 0, 16 * 32, INDIRECT)
        world.ring.make_available(5)
        chains = [world.queue.pop(), world.queue.pop()]
        assert [chain and chain.read() for chain in chains] == [b"direct", b"indirectindirect"]


def test_indices_wrap_at_the_ring_and_at_sixteen_bits(world: World) -> None:
    world.queue.restore(0xFFFD, 0xFFFD)
    world.ring.avail_index = world.ring.used_seen = 0xFFFD
    for n in range(20):
        head = world.ring.add([world.buffer(bytes([n]))])
        chain = world.queue.pop()
        assert chain is not None
        assert chain.read() == bytes([n])
        world.queue.push(chain, n)
        assert world.ring.used() == [(head, n)]


def broken_by(world: World) -> str:
    with pytest.raises(DeviceError) as broken:
        world.queue.pop()
    assert broken.value.errno == errno.EIO
    assert world.queue.fault is not None
    return world.queue.fault


def test_an_index_too_far_ahead_breaks_the_queue(world: World) -> None:
    world.memory.write(world.ring.driver + 2, (9).to_bytes(2, "little"))
    assert broken_by(world) == FAULTS[1]
    with pytest.raises(DeviceError):
        world.queue.pop()


def test_exactly_a_full_ring_is_fine(world: World) -> None:
    for _ in range(8):
        world.ring.add([world.buffer(b"x")])
    for _ in range(8):
        assert world.queue.pop() is not None
    assert world.queue.pop() is None


def test_a_head_beyond_the_table_breaks_the_queue(world: World) -> None:
    world.ring.make_available(8)
    assert broken_by(world) == FAULTS[2]


def test_a_successor_beyond_the_table_breaks_the_queue(world: World) -> None:
    world.ring.set_descriptor(0, world.memory.iova, 1, NEXT, 8)
    world.ring.make_available(0)
    assert broken_by(world) == FAULTS[2]


def test_a_loop_breaks_the_queue(world: World) -> None:
    world.ring.set_descriptor(0, world.memory.iova, 1, NEXT, 1)
    world.ring.set_descriptor(1, world.memory.iova, 1, NEXT, 0)
    world.ring.make_available(0)
    assert broken_by(world) == FAULTS[3]


def test_readable_after_writable_breaks_the_queue(world: World) -> None:
    world.ring.add([world.room(1), world.buffer(b"x")])
    assert broken_by(world) == FAULTS[4]


def test_an_indirect_table_in_an_indirect_table_breaks_the_queue(world: World) -> None:
    table = world.memory.allocate(16)
    world.memory.write(
        table,
        world.memory.iova.to_bytes(8, "little") + (16).to_bytes(4, "little") + bytes([INDIRECT, 0, 0, 0]),
    )
    world.ring.set_descriptor(0, table, 16, INDIRECT)
    world.ring.make_available(0)
    assert broken_by(world) == FAULTS[5]


def test_an_indirect_descriptor_that_was_not_negotiated_breaks_the_queue(
    make_world: Callable[..., World],
) -> None:
    world = make_world(indirect=False)
    world.ring.add_indirect([world.buffer(b"x")])
    assert broken_by(world) == FAULTS[5]


@pytest.mark.parametrize("length", [0, 15, 24, 16 * (MAX_CHAIN + 1)])
def test_an_indirect_table_of_an_impossible_length_breaks_the_queue(world: World, length: int) -> None:
    world.ring.set_descriptor(0, world.memory.iova, length, INDIRECT)
    world.ring.make_available(0)
    assert broken_by(world) == FAULTS[6]


def test_the_longest_indirect_table_is_followed(world: World) -> None:
    room = world.room(1)
    world.ring.add_indirect([room] * MAX_CHAIN)
    chain = world.queue.pop()
    assert chain is not None
    assert len(chain.writable) == MAX_CHAIN


def test_an_indirect_table_outside_the_windows_breaks_the_queue(world: World) -> None:
    world.ring.set_descriptor(0, 0x900000000, 32, INDIRECT)
    world.ring.make_available(0)
    assert broken_by(world) == FAULTS[7]


@pytest.mark.parametrize("lengths", [[0], [0xFFFFFFFF, 1]])
def test_a_chain_that_holds_nothing_or_too_much_breaks_the_queue(world: World, lengths: list[int]) -> None:
    world.ring.add([(world.memory.iova, length, True) for length in lengths])
    assert broken_by(world) == FAULTS[9]


def test_a_buffer_outside_the_windows_is_an_error_of_the_access(world: World) -> None:
    world.ring.add([(0x900000000, 4, False)])
    chain = world.queue.pop()
    assert chain is not None
    with pytest.raises(DeviceError, match="not in readable windows"):
        chain.read()


@pytest.mark.parametrize("size", [0, 3, 512, 65535])
def test_an_impossible_ring_size_is_refused(world: World, size: int) -> None:
    with pytest.raises(DeviceError, match="size"):
        world.queue.enable(size, *world.ring.addresses)


@pytest.mark.parametrize("shift", [(8, 0, 0), (0, 1, 0), (0, 0, 2)])
def test_rings_that_are_not_aligned_are_refused(world: World, shift: tuple[int, int, int]) -> None:
    moved = [a + s for a, s in zip(world.ring.addresses, shift, strict=True)]
    with pytest.raises(DeviceError, match="not aligned"):
        world.queue.enable(8, *moved)


@pytest.mark.parametrize("size", [0, 3, MAX_QUEUE_SIZE * 2 % 65536])
def test_a_device_cannot_have_a_queue_of_an_impossible_size(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        VirtQueue(DmaWindows(), 0, size)


def test_a_queue_whose_rings_are_not_mapped_waits_for_them(world: World) -> None:
    world.ring.add([world.buffer(b"x")])
    world.dma.unmap_all()
    assert world.queue.pop() is None
    assert world.queue.fault is None
    world.memory.map_into(world.dma)
    chain = world.queue.pop()
    assert chain is not None
    assert chain.read() == b"x"


def test_the_driver_can_silence_interrupts_by_flag(world: World) -> None:
    world.ring.set_no_interrupt(True)
    world.ring.add([world.room(1)])
    world.ring.add([world.room(1)])
    first, second = world.queue.pop(), world.queue.pop()
    assert first is not None
    assert second is not None
    assert not world.queue.push(first)
    world.ring.set_no_interrupt(False)
    assert world.queue.push(second)


def test_kicks_are_asked_for_by_flag(world: World, road: str) -> None:
    world.queue.disable_kicks()
    assert world.ring.no_notify == (road == "mapped")  # it is not worth a message
    assert not world.queue.enable_kicks()
    assert not world.ring.no_notify
    world.ring.add([world.room(1)])
    assert world.queue.enable_kicks()


def test_kicks_are_asked_for_by_event_index(make_world: Callable[..., World]) -> None:
    world = make_world(event_index=True)
    world.ring.add([world.room(1)])
    world.queue.pop()
    assert not world.queue.enable_kicks()
    assert world.ring.avail_event == 1


@settings(max_examples=200)
@given(
    st.integers(0, 0xFFFF),
    st.lists(st.tuples(st.integers(1, 8), st.integers(-3, 12)), min_size=1, max_size=20),
)
def test_an_interrupt_is_due_when_the_used_index_passes_the_event(
    start: int, bursts: list[tuple[int, int]]
) -> None:
    dma = DmaWindows()
    with guest_memory(dma) as memory:
        world = World(memory, dma, event_index=True)
        world.queue.restore(start, start)
        world.ring.avail_index = world.ring.used_seen = start
        used = start
        known = False
        for count, ahead in bursts:
            event = (used + ahead) & 0xFFFF
            world.ring.set_used_event(event)
            chains = []
            for _ in range(count):
                world.ring.add([(memory.iova, 1, True)])
                chains.append(world.queue.pop())
            wanted = []
            for chain in chains:
                assert chain is not None
                before, used = used, (used + 1) & 0xFFFF
                wanted.append(not known or before == event)
                known = True
                assert world.queue.push(chain) == wanted[-1]
            world.ring.used()


@settings(max_examples=300)
@given(st.randoms(use_true_random=False), st.binary(max_size=200))
def test_garbage_in_the_rings_breaks_at_most_the_queue(chance: random.Random, garbage: bytes) -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x4000) as memory:
        world = World(memory, dma, 16)
        for byte in garbage:
            memory.bytes[chance.randrange(0x200)] = byte
        for _ in range(20):
            try:
                chain = world.queue.pop()
                if chain is None:
                    break
                chain.read()
                world.queue.push(chain, chain.write(b"x" * 10))
            except DeviceError as error:
                assert error.errno in (errno.EIO, errno.EFAULT)


def test_write_flag_is_what_the_specification_says() -> None:
    assert (NEXT, WRITE, INDIRECT) == (1, 2, 4)


# --- a queue that comes to rest, and where it goes on


def test_a_queue_that_stops_takes_no_chain_and_is_enabled_until_the_last_is_pushed(world: World) -> None:
    queue, ring = world.queue, world.ring
    heads = [ring.add([world.buffer(b"one")]), ring.add([world.buffer(b"two")])]
    chain = queue.pop()
    assert chain is not None
    queue.stop()
    queue.finish_stop()
    assert queue.enabled
    assert queue.stopping
    assert queue.pop() is None
    assert queue.last_avail == 0
    queue.push(chain)
    queue.finish_stop()
    assert not queue.enabled
    assert (queue.last_avail, queue.used_index) == (1, 1)
    assert ring.used() == [(heads[0], 0)]
    queue.place(1, 1)
    queue.enable(ring.size, *ring.addresses)
    again = queue.pop()
    assert again is not None
    assert (again.head, again.read()) == (heads[1], b"two")


def test_a_stop_can_be_called_off_while_a_chain_is_in_flight(world: World) -> None:
    queue, ring = world.queue, world.ring
    heads = [ring.add([world.buffer(b"one")]), ring.add([world.buffer(b"two")])]
    first = queue.pop()
    queue.stop()
    queue.go_on()
    second = queue.pop()
    assert first is not None
    assert second is not None
    queue.push(first)
    queue.push(second)
    queue.finish_stop()
    assert queue.enabled
    assert ring.used() == [(head, 0) for head in heads]


def test_a_queue_that_is_not_enabled_has_nothing_to_stop(world: World) -> None:
    world.queue.disable()
    world.queue.stop()
    assert not world.queue.stopping


@pytest.mark.parametrize("why", ["broken", "unmapped"])
def test_a_queue_whose_completions_can_never_be_seen_comes_to_rest_all_the_same(
    world: World, why: str
) -> None:
    world.queue.restore(5, 5, fault=1 if why == "broken" else 0)  # the driver has not seen 5 yet, perhaps
    if why == "unmapped":
        world.dma.unmap_all()
    world.queue.stop()
    world.queue.finish_stop()
    assert not world.queue.enabled
    assert (world.queue.last_avail, world.queue.used_index) == (5, 5)


def test_a_queue_waits_for_what_its_driver_has_not_seen(world: World) -> None:
    world.queue.restore(5, 5)
    world.queue.stop()
    world.queue.finish_stop()
    assert world.queue.enabled
    world.queue.settle()
    world.queue.finish_stop()
    assert not world.queue.enabled


def test_a_queue_that_is_enabled_goes_on_where_it_is_placed(world: World) -> None:
    """Where a driver enables it before it says from where."""
    world.queue.place(0xFFFF, 0xFFFF)
    assert (world.queue.last_avail, world.queue.used_index) == (0xFFFF, 0xFFFF)
    world.queue.place(0, 0)
    head = world.ring.add([world.buffer(b"one")])
    chain = world.queue.pop()
    assert chain is not None
    assert (chain.head, chain.read()) == (head, b"one")


def test_what_is_enabled_again_or_reset_is_not_stopping(world: World) -> None:
    world.queue.restore(5, 5)
    world.queue.stop()
    world.queue.enable(world.ring.size, *world.ring.addresses)
    assert not world.queue.stopping
    world.queue.stop()
    world.queue.reset()
    assert not world.queue.stopping
