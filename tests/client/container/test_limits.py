from __future__ import annotations

import resource
import subprocess
import sys
from errno import ENOMEM, ENOSPC

import pytest

from client.container import ContainerError, Mode, PageMemory, open_container
from client.container.limits import DMA_ENTRY_LIMIT, PAGE, LockedMemory, process_limit
from tests.client.container.believer import believing, refused


async def test_one_mapping_more_than_there_may_be_is_refused() -> None:
    async with open_container() as container:
        with PageMemory.allocate(PAGE) as memory:
            for number in range(DMA_ENTRY_LIMIT):
                await container.map(0x10_0000 + number * 2 * PAGE, memory)
            assert await refused(container.map(0x1000, memory)) == ENOSPC
            await container.unmap(0x10_0000 + 500 * 2 * PAGE, PAGE)
            await container.map(0x1000, memory)
            assert await container.unmap(0, 1 << 63) == DMA_ENTRY_LIMIT * PAGE


async def test_iommufd_has_no_such_limit() -> None:
    async with open_container(Mode.IOMMUFD, entry_limit=1) as container:
        with PageMemory.allocate(PAGE) as memory:
            await container.map(0x1000, memory)
            await container.map(0x2000, memory)


async def test_one_page_more_than_may_be_locked_is_refused() -> None:
    async with believing() as (session, _), open_container(locked_limit=3 * PAGE) as container:
        await container.attach(session)
        with PageMemory.allocate(2 * PAGE) as memory:
            await container.map(0x1000, memory)
            assert await refused(container.map(0x10000, memory)) == ENOMEM
            await container.map(0x10000, memory.part(0, PAGE))
            assert container.locked_pages == 3
            assert await refused(container.map(0x20000, memory.part(0, PAGE))) == ENOMEM
            await container.unmap(0x1000, 2 * PAGE)
            assert container.locked_pages == 1


async def test_the_first_device_locks_all_that_is_mapped() -> None:
    async with believing() as (session, server), open_container(locked_limit=PAGE) as container:
        with PageMemory.allocate(2 * PAGE) as memory:
            await container.map(0x1000, memory)
            assert container.locked_pages == 0
            assert await refused(container.attach(session)) == ENOMEM
            assert (container.sessions, container.locked_pages, server.told) == ((), 0, [])
            await container.unmap(0x1000, 2 * PAGE)
            await container.attach(session)


async def test_no_limit_is_none() -> None:
    async with believing() as (session, _), open_container(locked_limit=None) as container:
        await container.attach(session)
        with PageMemory.allocate(64 << 20) as memory:
            await container.map(0x1000_0000, memory)
            assert container.locked_pages == (64 << 20) // PAGE


def test_the_limit_is_in_whole_pages() -> None:
    locked = LockedMemory(2 * PAGE - 1)
    locked.check(1)
    with pytest.raises(ContainerError):
        locked.check(2)


def test_whoever_may_lock_any_memory_has_no_limit_and_others_have_rlimit_memlock() -> None:
    program = (
        "import os, resource; from client.container.limits import process_limit\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (12345, 12345)); print(process_limit())\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "print(process_limit())\n"
    )
    lines = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert lines[-1] == "12345"
    assert lines[0] in ("None", "12345")
    assert process_limit() in (None, resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
