import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.dma import PAGE_SIZE, DmaWindows
from device.dma._files import MAX_BACKINGS
from device.errors import DeviceError
from tests.device.driver_side import guest_memory


def refusal(call: object, *args: object) -> int:
    with pytest.raises(DeviceError) as refused:
        call(*args)  # type: ignore[operator]
    assert refused.value.errno is not None
    return refused.value.errno


def test_bytes_written_by_the_device_are_in_the_clients_file() -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x4000, iova=0x10000) as memory:
        dma.write(0x10FFE, b"abcd")
        assert memory.read(0x10FFE, 4) == b"abcd"
        assert dma.read(0x10FFE, 4) == b"abcd"


def test_an_access_may_cross_windows_that_adjoin() -> None:
    dma = DmaWindows()
    with guest_memory(size=0x4000) as memory:
        dma.map(0x1000, 0x1000, 3, memory.fd, 0x2000)
        dma.map(0x2000, 0x1000, 3, memory.fd, 0x1000)
        dma.write(0x1FFE, b"wxyz")
        assert (memory.bytes[0x2FFE:0x3000], memory.bytes[0x1000:0x1002]) == (b"wx", b"yz")


def test_an_access_that_leaves_the_windows_writes_nothing() -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x1000, iova=0x1000) as memory:
        assert refusal(dma.write, 0x1FFE, b"abcd") == errno.EFAULT
        assert memory.bytes[0xFFE:] == b"\0\0"
        assert refusal(dma.read, 0xFFE, 4) == errno.EFAULT


def test_permissions_are_those_of_the_window() -> None:
    dma = DmaWindows()
    with guest_memory(size=0x2000) as memory:
        dma.map(0x1000, 0x1000, 1, memory.fd, 0)
        dma.map(0x2000, 0x1000, 2, memory.fd, 0x1000)
        assert refusal(dma.write, 0x1000, b"x") == errno.EFAULT
        assert refusal(dma.read, 0x2000, 1) == errno.EFAULT


@pytest.mark.parametrize(
    ("iova", "size", "prot", "offset", "code"),
    [
        (0x1000, 0, 3, 0, errno.EINVAL),
        (0x1001, 0x1000, 3, 0, errno.EINVAL),
        (0x1000, 0x800, 3, 0, errno.EINVAL),
        (0x1000, 0x1000, 3, 0x10, errno.EINVAL),
        (0x1000, 0x1000, 0, 0, errno.EINVAL),
        (0x1000, 0x1000, 4, 0, errno.EINVAL),
        (0x1000, 0x5000, 3, 0, errno.EINVAL),
        (0x1000, 0x1000, 3, 0x4000, errno.EINVAL),
        (0x1000, 0x2000, 3, 0x3000, errno.EINVAL),
        ((1 << 64) - 0x1000, 0x2000, 3, 0, errno.EINVAL),
        (0x8000, 0x1000, 3, 0, errno.EEXIST),
        (0x7000, 0x3000, 3, 0, errno.EEXIST),
    ],
)
def test_a_window_that_cannot_be_is_refused(iova: int, size: int, prot: int, offset: int, code: int) -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x4000, iova=0x8000) as memory:
        assert refusal(dma.map, iova, size, prot, memory.fd, offset) == code
        assert len(dma) == 1


def test_a_window_may_end_at_the_top_of_the_address_space() -> None:
    dma = DmaWindows()
    top = (1 << 64) - 0x1000
    with guest_memory(dma, size=0x1000, iova=top):
        dma.write(top + 0xFFF, b"x")
        assert refusal(dma.write, top + 0xFFF, b"xy") == errno.EFAULT
        assert dma.unmap(top, 0x1000) == 0x1000


def test_a_read_only_file_makes_no_writable_window(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "rom")  # noqa: PTH118
    dma = DmaWindows()
    writer = os.open(path, os.O_CREAT | os.O_RDWR)
    os.ftruncate(writer, 0x1000)
    reader = os.open(path, os.O_RDONLY)
    assert refusal(dma.map, 0, 0x1000, 3, reader, 0) == errno.EACCES
    dma.map(0, 0x1000, 1, reader, 0)
    assert dma.read(0, 4) == b"\0" * 4
    os.close(writer)
    os.close(reader)


@pytest.mark.parametrize("kind", ["pipe", "eventfd", "directory", "closed"])
def test_a_descriptor_that_cannot_be_mapped_is_refused(kind: str) -> None:
    dma = DmaWindows()
    opened: tuple[int, ...]
    if kind == "pipe":
        opened = os.pipe()
    elif kind == "eventfd":
        opened = (os.eventfd(0),)
    else:
        opened = (os.open("/", os.O_RDONLY),)
    if kind == "closed":
        os.close(opened[0])
    code = refusal(dma.map, 0, 0x1000, 1, opened[0], 0)
    assert code == (errno.EBADF if kind == "closed" else errno.EINVAL)
    assert len(dma) == 0
    if kind != "closed":
        for fd in opened:
            os.close(fd)


def test_unmapping_takes_every_window_inside_the_span_and_no_part_of_one() -> None:
    dma = DmaWindows()
    with guest_memory(size=0x8000) as memory:
        for page in range(4):
            dma.map(0x1000 * page, 0x1000, 3, memory.fd, 0x1000 * page)
        dma.map(0x10000, 0x2000, 3, memory.fd, 0)
        assert refusal(dma.unmap, 0x3000, 0xE000) == errno.EINVAL
        assert len(dma) == 5
        assert dma.unmap(0x1000, 0x2000) == 0x2000
        assert [window[0] for window in dma.windows()] == [0, 0x3000, 0x10000]


def test_unmapping_what_was_never_mapped_succeeds() -> None:
    dma = DmaWindows()
    assert dma.unmap(0, 1 << 63) == 0
    assert dma.unmap(0x800000000000, 0x800000000000) == 0
    assert refusal(dma.unmap, 0x1000, 0) == errno.EINVAL
    assert refusal(dma.unmap, 0x1000, (1 << 64) - 1) == errno.EINVAL


def test_a_window_without_a_file_is_accepted_but_cannot_be_reached() -> None:
    dma = DmaWindows()
    dma.map(0x1000, 0x1000, 3)
    assert dma.windows() == [(0x1000, 0x1000, 3, False)]
    assert refusal(dma.read, 0x1000, 1) == errno.EFAULT


def test_one_window_more_than_the_limit_is_refused() -> None:
    dma = DmaWindows(limit=3)
    for page in range(3):
        dma.map(page * PAGE_SIZE, PAGE_SIZE, 3)
    assert refusal(dma.map, 0x10000, PAGE_SIZE, 3) == errno.ENOSPC


def test_one_file_more_than_the_limit_is_refused_and_room_is_reused() -> None:
    dma = DmaWindows()

    def add(at: int) -> None:
        fd = os.memfd_create("one")
        os.ftruncate(fd, PAGE_SIZE)
        try:
            dma.map(at * PAGE_SIZE, PAGE_SIZE, 3, fd, 0)
        finally:
            os.close(fd)

    for at in range(MAX_BACKINGS):
        add(at)
    assert refusal(add, MAX_BACKINGS) == errno.ENOSPC
    dma.unmap(5 * PAGE_SIZE, PAGE_SIZE)
    add(MAX_BACKINGS)


def test_a_file_that_grew_is_mapped_again_and_old_windows_stay_good() -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x1000, iova=0x1000) as memory:
        os.ftruncate(memory.fd, 0x3000)
        dma.map(0x9000, 0x1000, 3, memory.fd, 0x2000)
        dma.write(0x1000, b"old")
        dma.write(0x9000, b"new")
        assert os.pread(memory.fd, 3, 0) == b"old"
        assert os.pread(memory.fd, 3, 0x2000) == b"new"


def test_memory_that_a_client_truncates_is_served_no_more_and_the_server_lives() -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x4000, iova=0x1000) as memory:
        dma.write(0x3000, b"data")
        os.ftruncate(memory.fd, 0x1000)
        assert refusal(dma.read, 0x3000, 4) == errno.EFAULT
        assert dma.lost_backings() == 1
        assert refusal(dma.write, 0x4000, b"lost") == errno.EFAULT
        assert refusal(dma.read, 0x1000, 1) == errno.EFAULT
        assert dma.unmap_all() == 1
        assert dma.lost_backings() == 0


def test_a_write_that_meets_truncated_memory_is_refused() -> None:
    dma = DmaWindows()
    with guest_memory(dma, size=0x4000, iova=0x1000) as memory:
        os.ftruncate(memory.fd, 0x1000)
        assert refusal(dma.write, 0x3000, b"lost") == errno.EFAULT


def test_memory_that_has_come_back_is_served_by_windows_that_are_mapped_since() -> None:
    """And by the others of the same file, which have all the room that they had."""
    dma = DmaWindows()
    with guest_memory(dma, size=0x4000, iova=0x10000) as memory:
        dma.map(0x20000, 0x1000, 3, memory.fd, 0)
        os.ftruncate(memory.fd, 0)
        assert refusal(dma.read, 0x20000, 4) == errno.EFAULT
        dma.unmap(0x20000, 0x1000)
        os.ftruncate(memory.fd, 0x1000)
        dma.map(0x20000, 0x1000, 3, memory.fd, 0)
        assert dma.lost_backings() == 0
        dma.write(0x20000, b"back")
        assert dma.read(0x10000, 4) == b"back"
        assert refusal(dma.write, 0x13FFC, b"none") == errno.EFAULT
        assert refusal(dma.read, 0x20000, 4) == errno.EFAULT


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6), st.booleans()), max_size=30),
    st.integers(0, 50 * PAGE_SIZE),
    st.integers(1, 6 * PAGE_SIZE),
)
def test_the_table_equals_a_set_of_pages(changes: list[tuple[int, int, bool]], at: int, length: int) -> None:
    dma = DmaWindows()
    model: dict[int, tuple[int, int]] = {}
    with guest_memory(size=64 * PAGE_SIZE) as memory:
        memory.bytes[:] = bytes(page & 0xFF for page in range(64) for _ in range(PAGE_SIZE))
        for page, pages, mapping in changes:
            inside = set(range(page, page + pages))
            if mapping:
                try:
                    dma.map(page * PAGE_SIZE, pages * PAGE_SIZE, 3, memory.fd, page * PAGE_SIZE)
                except DeviceError as error:
                    assert error.errno == errno.EEXIST
                    assert inside & model.keys()
                else:
                    assert not inside & model.keys()
                    model |= dict.fromkeys(inside, (page, pages))
            else:
                cut = [
                    w for w in set(model.values()) if 0 < len(inside & set(range(w[0], w[0] + w[1]))) < w[1]
                ]
                try:
                    dma.unmap(page * PAGE_SIZE, pages * PAGE_SIZE)
                except DeviceError:
                    assert cut
                else:
                    assert not cut
                    model = {p: w for p, w in model.items() if p not in inside}
        touched = range(at // PAGE_SIZE, (at + length - 1) // PAGE_SIZE + 1)
        if all(page in model for page in touched):
            expected = bytes((at + i) // PAGE_SIZE & 0xFF for i in range(length))
            assert dma.read(at, length) == expected
        else:
            assert refusal(dma.read, at, length) == errno.EFAULT
