from __future__ import annotations

from errno import EINVAL, EOVERFLOW

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.container import Container, ContainerError, PageMemory, open_container
from client.container.limits import MAX_DIRTY_REPORT
from protocol.vfio import DmaMapFlags
from tests.client.container.believer import believing

READ = DmaMapFlags.READ
PAGE = 0x1000


def nothing(iova: int, size: int) -> None:
    pass


def pages(container: Container, iova: int = 0x10000, size: int = 0x100 * PAGE) -> list[int]:
    return list(container.dirty.report(iova, size).pages())


async def test_dirty_scope_flip() -> None:
    async with believing() as (session, _), open_container() as container:
        await container.attach(session)
        with PageMemory.allocate(4 * PAGE) as memory:
            await container.map(0x10000, memory)
            container.dirty.start()
            assert not container.dirty.pinned_scope
            assert pages(container) == [0x10000, 0x11000, 0x12000, 0x13000], "it may write anywhere"
            assert len(pages(container)) == 4
            with container.pin_user(nothing, session=session) as user:
                container.pin(0x12000, 1, READ, user=user)
                assert container.dirty.pinned_scope
                assert pages(container) == [0x12000]
            assert container.dirty.pinned_scope, "it has pinned once, and so it always does"


async def test_one_device_that_does_not_pin_makes_everything_dirty() -> None:
    async with believing() as (one, _), believing() as (other, _), open_container() as container:
        await container.attach(one)
        await container.attach(other)
        container.dirty.start()
        with PageMemory.allocate(4 * PAGE) as memory:
            await container.map(0x10000, memory)
            with container.pin_user(nothing, session=one) as user:
                container.pin(0x12000, 1, READ, user=user)
                assert len(pages(container)) == 4
                await container.detach(other)
                assert pages(container) == [0x12000]


async def test_a_page_is_dirty_when_it_is_pinned_while_it_is_and_in_the_report_after() -> None:
    async with open_container() as container:
        with PageMemory.allocate(4 * PAGE) as memory, container.pin_user(nothing) as user:
            await container.map(0x10000, memory)
            await container.map(0x20000, memory)
            container.pin(0x10000, 1, READ, user=user)
            container.dirty.start()
            container.dirty.start()
            container.pin(0x11000, 1, READ, user=user)
            container.unpin(0x11000, 1, user=user)
            container.pin(0x20000, 1, READ, user=user)
            assert pages(container) == [0x10000, 0x11000, 0x20000]
            assert pages(container) == [0x10000, 0x20000]
            container.unpin(0x10000, 1, user=user)
            assert pages(container) == [0x20000], "nothing wrote to it since"


async def test_a_pin_that_failed_leaves_its_pages_marked_as_the_kernel_does() -> None:
    async with open_container() as container:
        with PageMemory.allocate(PAGE) as memory, container.pin_user(nothing) as user:
            await container.map(0x10000, memory)
            container.dirty.start()
            with pytest.raises(ContainerError):
                container.pin(0x10000, 2, READ, user=user)
            assert pages(container) == [0x10000]


async def test_what_stops_being_tracked_is_forgotten() -> None:
    async with open_container() as container:
        with PageMemory.allocate(PAGE) as memory, container.pin_user(nothing) as user:
            await container.map(0x10000, memory)
            container.dirty.start()
            container.pin(0x10000, 1, READ, user=user)
            container.unpin(0x10000, 1, user=user)
            container.dirty.stop()
            container.dirty.start()
            assert pages(container) == []


@pytest.mark.parametrize(
    ("iova", "size", "tracking", "errno"),
    [
        (0x800, 0, False, EINVAL),
        ((1 << 64) - PAGE, 2 * PAGE, False, EOVERFLOW),
        (0x10000, 4 * PAGE, False, EINVAL),
        (0x10800, PAGE, True, EINVAL),
        (0x10000, 0x800, True, EINVAL),
        (0x11000, 3 * PAGE, True, EINVAL),  # cuts the mapping
        (0x10000, 3 * PAGE, True, EINVAL),
        (0, MAX_DIRTY_REPORT + PAGE, True, EINVAL),
    ],
)
async def test_reports_are_of_whole_mappings(iova: int, size: int, tracking: bool, errno: int) -> None:
    async with open_container() as container:
        with PageMemory.allocate(4 * PAGE) as memory:
            await container.map(0x10000, memory)
            if tracking:
                container.dirty.start()
            with pytest.raises(ContainerError) as caught:
                container.dirty.report(iova, size)
            assert caught.value.errno == errno


@given(st.integers(0, 300), st.integers(1, 300), st.integers(0, 300))
async def test_what_is_mapped_is_dirty_bit_by_bit(before: int, count: int, after: int) -> None:
    async with believing() as (session, _), open_container(locked_limit=None) as container:
        await container.attach(session)
        container.dirty.start()
        iova = 0x10000 + before * PAGE
        with PageMemory.allocate(count * PAGE) as memory:
            await container.map(iova, memory)
        found = pages(container, size=(before + count + after) * PAGE)
        assert found == list(range(iova, iova + count * PAGE, PAGE))
