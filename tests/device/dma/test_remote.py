"""Windows without memory here: the client is asked, in messages, by a thread that holds no gate meanwhile."""

import errno
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from device._gate import Gate
from device.dma import PAGE_SIZE, DmaWindows
from device.dma._windows import DEFAULT_REMOTE_LIMIT, MAX_REMOTE_LIMIT
from device.dma.remote import UnwantedError, Wanted, always
from device.errors import DeviceError
from tests.device.driver_side import GuestMemory, guest_memory
from tests.device.remote_side import Client, client_of

BASE = 0x10000


class World:
    def __init__(self, memory: GuestMemory, client: Client) -> None:
        self.memory, self.client = memory, client
        self.gate = Gate()
        self.dma = DmaWindows()
        self.dma.gate = self.gate
        self.dma.map(BASE, 0x4000, 3)
        self.dma.remote = client

    def in_the_gate(self, action: Callable[[], object]) -> Callable[[object], None]:
        """Does what a control thread does, which needs the gate for it."""

        def meanwhile(_: object) -> None:
            with self.gate:
                action()

        return meanwhile


@pytest.fixture
def world() -> Iterator[World]:
    with guest_memory(size=0x4000, iova=BASE) as memory, client_of(memory) as client:
        yield World(memory, client)


def refusal(call: Callable[..., object], *args: object) -> int:
    with pytest.raises(DeviceError) as refused:
        call(*args)
    assert refused.value.errno is not None
    return refused.value.errno


def test_memory_without_a_descriptor_is_read_and_written_by_asking(world: World) -> None:
    world.dma.write(BASE + 5, b"hello")
    assert world.memory.read(BASE + 5, 5) == b"hello"
    assert world.dma.read(BASE + 5, 5) == b"hello"
    assert world.client.asked == [("write", BASE + 5, 5), ("read", BASE + 5, 5)]


def test_nothing_is_asked_for_no_bytes(world: World) -> None:
    assert world.dma.read(BASE, 0) == b""
    world.dma.write(BASE, b"")
    assert world.client.asked == []


def test_an_access_may_lie_partly_in_memory_that_is_mapped_here(world: World) -> None:
    with guest_memory(world.dma, size=0x1000, iova=BASE + 0x4000) as mapped:
        world.dma.write(BASE + 0x3FFE, b"abcd")
        assert (world.memory.read(BASE + 0x3FFE, 2), mapped.read(BASE + 0x4000, 2)) == (b"ab", b"cd")
        assert world.dma.read(BASE + 0x3FFE, 4) == b"abcd"
        assert world.client.asked == [("write", BASE + 0x3FFE, 2), ("read", BASE + 0x3FFE, 2)]


def test_a_long_access_is_cut_into_messages_of_the_limit(world: World) -> None:
    world.dma.remote_limit = 0x1000
    data = os.urandom(0x2801)
    world.dma.write(BASE, data)
    assert world.dma.read(BASE, 0x2801) == data
    assert [length for _, _, length in world.client.asked] == [0x1000, 0x1000, 0x801] * 2


def test_a_message_has_a_limit_whatever_the_peer_grants(world: World) -> None:
    assert world.dma.remote_limit == DEFAULT_REMOTE_LIMIT
    world.dma.remote_limit = MAX_REMOTE_LIMIT + 1
    assert world.dma.remote_limit == MAX_REMOTE_LIMIT
    with pytest.raises(ValueError, match="no bytes"):
        world.dma.remote_limit = 0


def test_without_anybody_to_ask_such_memory_cannot_be_reached(world: World) -> None:
    assert world.dma.by_message
    world.dma.remote = None
    assert not world.dma.by_message
    assert refusal(world.dma.read, BASE, 1) == errno.EFAULT
    assert refusal(world.dma.write, BASE, b"x") == errno.EFAULT
    assert world.client.asked == []


def test_permissions_hold_for_messages_too(world: World) -> None:
    world.dma.map(0x1000, 0x1000, 1)
    world.dma.map(0x2000, 0x1000, 2)
    assert refusal(world.dma.write, 0x1000, b"x") == errno.EFAULT
    assert refusal(world.dma.read, 0x2000, 1) == errno.EFAULT
    assert world.client.asked == []


def test_a_write_that_leaves_the_windows_asks_for_nothing(world: World) -> None:
    assert refusal(world.dma.write, BASE + 0x3FFE, b"abcd") == errno.EFAULT
    assert world.client.asked == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.EPERM, errno.ENOTCONN])
def test_a_refusal_by_the_client_is_the_error_of_the_access(world: World, number: int) -> None:
    def refuse(_: object) -> None:
        raise DeviceError(number, "no")

    world.client.meanwhile = refuse
    assert refusal(world.dma.read, BASE, 4) == number
    world.dma.remote = world.client
    assert refusal(world.dma.write, BASE, b"data") == number


@pytest.mark.parametrize("number", [None, 0, -999, 1 << 30])
def test_a_refusal_with_an_impossible_number_is_an_input_output_error(
    world: World, number: int | None
) -> None:
    def refuse(_: object) -> None:
        error = DeviceError("no")
        error.errno = number
        raise error

    world.client.meanwhile = refuse
    assert refusal(world.dma.read, BASE, 4) == errno.EIO


@pytest.mark.parametrize("lie", [lambda data: data[:-1], lambda data: data + b"x", lambda data: 7])
def test_an_answer_of_another_length_is_none(world: World, lie: Callable[[bytes], bytes]) -> None:
    world.client.answer = lie
    assert refusal(world.dma.read, BASE, 4) == errno.EIO


def test_what_the_road_itself_stumbles_over_is_an_error_of_the_access(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(_: object) -> None:
        raise RuntimeError("a mistake")

    world.client.meanwhile = stumble
    with world.gate:
        assert refusal(world.dma.read, BASE, 4) == errno.EIO
    assert "a mistake" in caplog.text
    with world.gate:  # it is ours again, and once only
        pass


def test_a_client_that_is_gone_is_asked_no_more(world: World) -> None:
    def leave(_: object) -> None:
        raise DeviceError(errno.ENOTCONN, "gone")

    world.client.meanwhile = leave
    before = world.dma.generation
    assert refusal(world.dma.read, BASE, 4) == errno.ENOTCONN
    assert world.dma.generation > before
    assert refusal(world.dma.read, BASE, 4) == errno.EFAULT
    assert len(world.client.asked) == 1


def test_the_gate_is_free_while_the_client_is_asked_and_held_again_after(world: World) -> None:
    seen = []
    world.client.meanwhile = world.in_the_gate(lambda: seen.append("inside"))
    with world.gate, world.gate:
        world.dma.read(BASE, 4)
        assert seen == ["inside"]
    world.dma.read(BASE, 4)
    assert seen == ["inside", "inside"]


@pytest.mark.parametrize("change", ["disturb", "unmap_all"])
def test_an_answer_for_a_card_that_has_become_another_is_thrown_away(world: World, change: str) -> None:
    world.client.meanwhile = world.in_the_gate(getattr(world.dma, change))
    with world.gate:
        assert refusal(world.dma.read, BASE, 4) == errno.ECANCELED
    world.dma.unmap_all()
    world.dma.map(BASE, 0x1000, 3)
    with world.gate:
        assert refusal(world.dma.write, BASE, b"data") == errno.ECANCELED


@dataclass
class Overtaken:
    """`RemoteMemory` that is overtaken by something on its way to the client."""

    world: World
    change: Callable[[], object]

    def read(self, iova: int, length: int, wanted: Wanted = always) -> bytes:
        with self.world.gate:
            self.change()
            if not wanted():
                raise UnwantedError(errno.ECANCELED, "too late")
        return bytes(length)

    def write(self, iova: int, data: bytes, wanted: Wanted = always) -> None:
        self.read(iova, len(data), wanted)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda dma: dma.disturb(), errno.ECANCELED),
        (lambda dma: dma.unmap_all(), errno.ECANCELED),
        (lambda dma: dma.unmap(BASE, 0x4000), errno.ECANCELED),
        (lambda dma: dma.unmap(0, BASE), None),
    ],
)
def test_who_asks_the_client_is_told_when_that_is_no_longer_wanted(
    world: World, change: Callable[[DmaWindows], object], expected: int | None
) -> None:
    world.dma.remote = Overtaken(world, lambda: change(world.dma))
    with world.gate:
        if expected is None:
            assert world.dma.read(BASE, 4) == bytes(4)
        else:
            assert refusal(world.dma.write, BASE, b"data") == expected


def test_windows_that_change_while_the_client_is_asked_are_looked_up_anew(world: World) -> None:
    world.dma.remote_limit = 4
    with guest_memory(size=0x4000, iova=BASE) as mapped:
        mapped.write(BASE, b"12345678")

        def move() -> None:
            world.dma.unmap(BASE, 0x4000)
            mapped.map_into(world.dma)

        world.memory.write(BASE, b"abcdefgh")
        world.client.meanwhile = world.in_the_gate(move)
        with world.gate:
            assert world.dma.read(BASE, 8) == b"abcd5678"


def test_who_waits_for_windows_is_told_when_they_can_be_reached(world: World) -> None:
    told = []
    world.dma.on_map = lambda: told.append(True)
    world.dma.remote = None
    assert told == []
    world.dma.remote = world.client
    assert told == [True]


# --- memory that somebody else mapped


@pytest.fixture
def theirs() -> Iterator[tuple[int, mmap.mmap, int]]:
    """A file, a mapping of it, and the mapping's address."""
    fd = os.memfd_create("theirs", os.MFD_CLOEXEC)
    os.ftruncate(fd, 0x4000)
    memory = mmap.mmap(fd, 0x4000)
    with memoryview(memory) as view:
        address = _address_of(view)
    yield fd, memory, address
    gc.collect()  # windows of it, which refusals that were caught have kept
    memory.close()
    os.close(fd)


def _address_of(view: memoryview) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def test_memory_mapped_by_somebody_else_is_a_window_and_stays_theirs(
    theirs: tuple[int, mmap.mmap, int],
) -> None:
    _, memory, address = theirs
    dma = DmaWindows()
    dma.map_memory(BASE, 0x2000, 3, address + 0x1000)
    dma.map_memory(BASE + 0x2000, 0x1000, 1, address)
    assert dma.windows() == [(BASE, 0x2000, 3, True), (BASE + 0x2000, 0x1000, 1, True)]
    dma.write(BASE + 1, b"data")
    assert memory[0x1001:0x1005] == b"data"
    assert dma.read(BASE + 1, 4) == b"data"
    assert refusal(dma.write, BASE + 0x2000, b"x") == errno.EFAULT
    assert dma.unmap(BASE, 0x2000) == 0x2000
    dma.unmap_all()
    memory[0x1001:0x1005] = b"mine"


@pytest.mark.parametrize(
    ("iova", "size", "prot", "shift", "page", "code"),
    [
        (BASE, 0, 3, 0, 4096, errno.EINVAL),
        (BASE + 1, 0x1000, 3, 0, 4096, errno.EINVAL),
        (BASE, 0x1000, 0, 0, 4096, errno.EINVAL),
        (BASE, 0x1000, 3, 8, 4096, errno.EINVAL),
        (BASE, 0x1000, 3, 0, 2048, errno.EINVAL),
        (BASE, 0x1000, 3, 0, 12288, errno.EINVAL),
        (0x8000, 0x1000, 3, 0, 4096, errno.EEXIST),
    ],
)
def test_memory_that_cannot_be_a_window_is_refused(
    theirs: tuple[int, mmap.mmap, int], iova: int, size: int, prot: int, shift: int, page: int, code: int
) -> None:
    dma = DmaWindows()
    dma.map(0x8000, 0x1000, 3)
    assert refusal(dma.map_memory, iova, size, prot, theirs[2] + shift, page) == code
    assert refusal(dma.map_memory, BASE, PAGE_SIZE, 3, 0) == errno.EINVAL
    assert len(dma) == 1


def test_their_memory_too_may_be_truncated(theirs: tuple[int, mmap.mmap, int]) -> None:
    fd, _, address = theirs
    dma = DmaWindows()
    dma.map_memory(BASE, 0x4000, 3, address)
    os.ftruncate(fd, 0x1000)
    assert refusal(dma.read, BASE + 0x2000, 4) == errno.EFAULT
    assert refusal(dma.read, BASE + 0x2000, 4) == errno.EFAULT


def test_memory_of_others_is_looked_after_no_longer_than_windows_show_it(
    theirs: tuple[int, mmap.mmap, int],
) -> None:
    """Who forgets to unmap them leaves nothing that answers for what is mapped there next."""
    fd, memory, address = theirs
    dma = DmaWindows()
    dma.map_memory(BASE, 0x4000, 3, address)
    del dma
    memory.close()
    dma = DmaWindows()
    dma.map(BASE, 0x4000, 3, fd)
    os.ftruncate(fd, 0)
    assert refusal(dma.read, BASE, 4) == errno.EFAULT
