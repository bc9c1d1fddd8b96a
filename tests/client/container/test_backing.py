from __future__ import annotations

import os
from errno import EBADF, EFAULT, EINVAL, ENODEV, ENOMEM
from pathlib import Path

import pytest

from client.container import ContainerError, PageMemory, open_container
from client.container.backing import HUGE_PAGE
from protocol.vfio import DmaMapFlags
from tests.client.container.believer import Believed, believing, refused
from tests.descriptors import open_fds, settled_fds

PAGE = 0x1000


def test_memory_is_whole_pages_that_nobody_can_make_fewer() -> None:
    with PageMemory.allocate(PAGE + 1) as memory:
        assert (memory.length, len(memory.view), memory.writable) == (2 * PAGE, 2 * PAGE, True)
        with pytest.raises(PermissionError):
            os.truncate(memory.fd, 0)


async def test_a_file_on_a_disk_is_memory_too(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    path.write_bytes(b"a" * PAGE + b"b" * PAGE)
    fd = os.open(path, os.O_RDWR)
    with PageMemory(fd, PAGE, PAGE) as memory:
        os.close(fd)
        memory.view[1:2] = b"c"
        assert path.read_bytes()[PAGE : PAGE + 2] == b"bc"
        async with believing() as (session, server), open_container() as container:
            await container.attach(session)
            await container.map(0x1000, memory)
            assert server.windows == {0x1000: Believed(PAGE, 3, PAGE, path.stat().st_ino)}


async def test_memory_stays_as_long_as_it_is_mapped_or_pinned() -> None:
    before = settled_fds()
    async with open_container() as container:
        memory = PageMemory.allocate(2 * PAGE)
        memory.view[PAGE : PAGE + 5] = b"hello"
        await container.map(0x1000, memory.part(PAGE, PAGE))
        part = memory.part(0, PAGE)
        memory.close()
        memory.close()
        assert memory.fd >= 0, "somebody else has it"
        part.close()
        with container.pin_user(lambda iova, size: None) as user:
            (page,) = container.pin(0x1000, 1, DmaMapFlags.READ, user=user)
            assert bytes(page.view[:5]) == b"hello"
        assert open_fds() - before
        await container.unmap(0x1000, PAGE)
        assert memory.fd == -1
    assert open_fds() == before


async def test_closed_memory_cannot_be_mapped() -> None:
    async with open_container() as container:
        memory = PageMemory.allocate(PAGE)
        memory.close()
        assert await refused(container.map(0x1000, memory)) == EFAULT
        assert container.entries == ()


def test_a_view_may_outlive_the_memory() -> None:
    memory = PageMemory.allocate(PAGE)
    view = memory.view[:5]
    view[:] = b"hello"
    memory.close()
    assert bytes(view) == b"hello"


@pytest.mark.parametrize(
    ("offset", "length", "errno"),
    [
        (0, 0, EINVAL),
        (-PAGE, PAGE, EINVAL),
        (0, PAGE - 1, EINVAL),
        (1, PAGE, EINVAL),
        (PAGE, 2 * PAGE, EFAULT),
        (2 * PAGE, PAGE, EFAULT),
    ],
)
def test_memory_is_what_the_file_has(offset: int, length: int, errno: int) -> None:
    before = settled_fds()
    with PageMemory.allocate(2 * PAGE) as memory:
        with pytest.raises(ContainerError) as caught:
            PageMemory(memory.fd, offset, length)
        assert caught.value.errno == errno
        with pytest.raises(ContainerError) as caught:
            memory.part(offset, length)
        assert caught.value.errno == EINVAL
    assert open_fds() == before


def test_what_is_no_memory_is_refused() -> None:
    before = settled_fds()
    fd = os.eventfd(0)
    try:
        with pytest.raises(ContainerError) as caught:
            PageMemory(fd, 0, PAGE)
        assert caught.value.errno in (EFAULT, ENODEV)
    finally:
        os.close(fd)
    with pytest.raises(ContainerError) as caught:
        PageMemory(-1, 0, PAGE)
    assert caught.value.errno == EBADF
    assert open_fds() == before


def huge_pages() -> int:
    return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text("ascii"))


def test_huge_pages_are_taken_where_the_machine_has_them_and_else_refused() -> None:
    before = settled_fds()
    if huge_pages():
        with PageMemory.allocate(PAGE, hugetlb=True) as memory:
            assert memory.length == HUGE_PAGE
            assert os.fstat(memory.fd).st_blksize == HUGE_PAGE
            memory.view[-5:] = b"hello"
            with memory.part(HUGE_PAGE - PAGE, PAGE) as last:
                assert bytes(last.view[-5:]) == b"hello"
    else:
        with pytest.raises(ContainerError) as caught:
            PageMemory.allocate(PAGE, hugetlb=True)
        assert caught.value.errno == ENOMEM
    assert open_fds() == before
