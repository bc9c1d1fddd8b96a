from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from errno import EACCES, EBUSY, EINVAL, EIO, ENODEV, ENOENT, ENOMEM, EOVERFLOW, EPERM

import pytest
import trio
import trio.testing

from client.container import Container, ContainerError, Mode, PageMemory, PinUser, open_container
from client.container.limits import UNPIN_ROUNDS
from protocol.vfio import DmaMapFlags
from tests.client.container.believer import believing, refused, some_of, with_bar
from tests.client.peer import DMA_MAP

READ, WRITE = DmaMapFlags.READ, DmaMapFlags.WRITE
BOTH = READ | WRITE
PAGE = 0x1000
END = 1 << 64


def nothing(iova: int, size: int) -> None:
    pass


def refusal(call: Callable[..., object], *arguments: object, user: PinUser) -> int:
    with pytest.raises(ContainerError) as caught:
        call(*arguments, user=user)
    return caught.value.errno


@asynccontextmanager
async def pages_and_a_bar(
    mode: Mode = Mode.TYPE1V2, locked_limit: int | None = None
) -> AsyncIterator[Container]:
    """Four pages at 0x10000, of which the last cannot be written to, and a BAR's pages next to them."""
    async with with_bar() as (_, _, mapping), open_container(mode, locked_limit=locked_limit) as container:
        with PageMemory.allocate(4 * PAGE) as memory:
            memory.view[::PAGE] = b"0123"
            await container.map(0x10000, memory.part(0, 3 * PAGE))
            await container.map(0x13000, memory.part(3 * PAGE, PAGE), READ)
            if mode is not Mode.IOMMUFD:
                await container.map(0x14000, some_of(mapping))
        yield container


async def test_a_pinned_page_is_the_memory_itself() -> None:
    async with pages_and_a_bar() as container:
        with container.pin_user(nothing) as user:
            pages = container.pin(0x11000, 3, READ, user=user)
            assert [bytes(page.view[:1]) for page in pages] == [b"1", b"2", b"3"]
            assert [len(page.view) for page in pages] == [PAGE] * 3
            assert container.unpin(0x11000, 3, user=user) == 3


# (mode, iova, pages, flags, registered, errno), in the kernel's order: each but the last is wrong in what is
# checked later as well.
PRECEDENCE = [
    (Mode.TYPE1, END, 0, WRITE, False, EINVAL),  # no pages
    (Mode.TYPE1, END, 1, WRITE, False, EACCES),  # this version has no pins
    (Mode.TYPE1V2, END, 1, WRITE, False, EOVERFLOW),
    (Mode.TYPE1V2, END - PAGE, 2, WRITE, False, EOVERFLOW),
    (Mode.TYPE1V2, 0x1000, 1, WRITE, False, EINVAL),  # nobody registered
    (Mode.TYPE1V2, 0x1000, 1, WRITE, True, EINVAL),  # not mapped
    (Mode.IOMMUFD, 0x1000, 1, WRITE, True, ENOENT),
    (Mode.TYPE1V2, 0x13000, 1, BOTH, True, EPERM),
    (Mode.TYPE1V2, 0x13000, 1, WRITE, True, EPERM),
    (Mode.TYPE1V2, 0x14000, 1, READ, True, EINVAL),  # no pages there
    (Mode.TYPE1V2, 0x10800, 1, READ, True, EINVAL),  # no page begins there
    (Mode.TYPE1V2, 0x10000, 1, BOTH, True, 0),
]


@pytest.mark.parametrize(("mode", "iova", "count", "flags", "registered", "errno"), PRECEDENCE)
async def test_error_precedence(
    mode: Mode, iova: int, count: int, flags: DmaMapFlags, registered: bool, errno: int
) -> None:
    async with pages_and_a_bar(mode) as container:
        with container.pin_user(nothing) as somebody, container.pin_user(nothing) as user:
            pass
        with container.pin_user(nothing) as somebody:
            user = somebody if registered else user
            if errno:
                assert refusal(container.pin, iova, count, flags, user=user) == errno
            else:
                assert len(container.pin(iova, count, flags, user=user)) == count


async def test_nothing_is_pinned_while_mappings_are_changed() -> None:
    async with believing() as (session, server), pages_and_a_bar() as container:
        await container.attach(session)
        server.gate = trio.Event()
        with container.pin_user(nothing) as user:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(container.protect, 0x10000, 3 * PAGE, READ)
                await trio.testing.wait_all_tasks_blocked()
                assert refusal(container.pin, 0x13000, 1, READ, user=user) == EBUSY
                assert refusal(container.pin, END, 1, READ, user=user) == EOVERFLOW
                server.gate.set()
            container.pin(0x13000, 1, READ, user=user)


async def test_nothing_is_pinned_in_a_mapping_that_is_not_there_yet() -> None:
    async with believing() as (session, server), pages_and_a_bar() as container:
        await container.attach(session)
        server.gate = trio.Event()
        server.refuse[DMA_MAP] = EIO
        with container.pin_user(nothing) as user, PageMemory.allocate(PAGE) as memory:

            async def map_in_vain() -> None:
                assert await refused(container.map(0x20000, memory)) == EIO

            async with trio.open_nursery() as nursery:
                nursery.start_soon(map_in_vain)
                await trio.testing.wait_all_tasks_blocked()
                assert refusal(container.pin, 0x20000, 1, READ, user=user) == EBUSY
                assert len(container.entries) == 3
                assert container.pin(0x10000, 1, READ, user=user)
                server.gate.set()
            assert refusal(container.pin, 0x20000, 1, READ, user=user) == EINVAL


async def test_a_container_that_closes_forgets_pins() -> None:
    with ExitStack() as stack:
        async with pages_and_a_bar() as container:
            user = stack.enter_context(container.pin_user(nothing))
            container.pin(0x10000, 2, READ, user=user)
        assert container.unpin(0x10000, 2, user=user) == 0
        assert refusal(container.pin, 0x10000, 1, READ, user=user) == EINVAL


async def test_a_pin_across_a_page_and_pfnmap_boundary_rolls_back() -> None:
    async with pages_and_a_bar() as container:
        with container.pin_user(nothing) as user:
            container.pin(0x12000, 1, READ, user=user)
            assert refusal(container.pin, 0x11000, 4, READ, user=user) == EINVAL
            assert container.locked_pages == 1, "what was pinned before stays pinned"
            assert [dict(entry.pins) for entry in container.entries] == [{2: 1}, {}, {}]


async def test_a_pin_across_a_change_of_permissions_rolls_back() -> None:
    async with pages_and_a_bar() as container:
        with container.pin_user(nothing) as user:
            assert refusal(container.pin, 0x11000, 3, WRITE, user=user) == EPERM
            assert container.locked_pages == 0


async def test_double_pin_and_unpin_count() -> None:
    async with pages_and_a_bar() as container:
        with container.pin_user(nothing) as user, container.pin_user(nothing) as other:
            container.pin(0x10000, 2, READ, user=user)
            container.pin(0x10000, 1, READ, user=user)
            container.pin(0x10000, 1, READ, user=other)
            assert container.entries[0].pins == {0: 3, 1: 1}
            assert container.locked_pages == 2
            assert container.unpin(0x10000, 2, user=user) == 2
            assert container.unpin(0x10000, 2, user=user) == 1
            assert container.unpin(0x10000, 2, user=user) == 0
            assert container.entries[0].pins == {0: 1}
            assert container.unpin(0x10000, 1, user=other) == 1
            assert container.locked_pages == 0
            assert not user.pages, "nothing is kept of what was pinned once"


async def test_unpinning_has_its_errors_too() -> None:
    async with pages_and_a_bar() as container:
        with container.pin_user(nothing) as user:
            assert refusal(container.unpin, 0x10000, 0, user=user) == EINVAL
    async with pages_and_a_bar(Mode.TYPE1) as container:
        with container.pin_user(nothing) as user:
            assert refusal(container.unpin, 0x10000, 1, user=user) == EACCES


async def test_whoever_leaves_unpins_what_he_has() -> None:
    async with pages_and_a_bar() as container:
        with container.pin_user(nothing) as user, container.pin_user(nothing) as other:
            container.pin(0x10000, 2, READ, user=other)
            with container.pin_user(nothing) as third:
                container.pin(0x10000, 3, READ, user=third)
                container.pin(0x10000, 1, READ, user=third)
            assert container.entries[0].pins == {0: 1, 1: 1}
            assert refusal(container.pin, 0x10000, 1, READ, user=third) == EINVAL
            container.pin(0x10000, 1, READ, user=user)
        assert container.locked_pages == 0


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_unmap_while_pinned_calls_the_callback_and_then_finds_no_pins(asynchronous: bool) -> None:
    async with pages_and_a_bar() as container:
        called: list[tuple[int, int]] = []

        def let_go(iova: int, size: int) -> None:
            called.append((iova, size))
            container.unpin(0x10000, 2, user=user)

        async def let_go_later(iova: int, size: int) -> None:
            await trio.lowlevel.checkpoint()
            let_go(iova, size)

        with container.pin_user(let_go_later if asynchronous else let_go) as user:
            container.pin(0x10000, 2, READ, user=user)
            assert await container.unmap(0x10000, 4 * PAGE) == 4 * PAGE
            assert called == [(0x10000, 3 * PAGE)], "nobody is asked about the mapping without pins"
            assert container.locked_pages == 0


async def test_everybody_is_asked_whoever_has_the_pages() -> None:
    async with pages_and_a_bar() as container:
        asked: list[str] = []

        def let_go(iova: int, size: int) -> None:
            asked.append("who has them")
            container.unpin(0x10000, 1, user=user)

        with container.pin_user(let_go) as user, container.pin_user(lambda iova, size: asked.append("other")):
            container.pin(0x10000, 1, READ, user=user)
            await container.unmap(0x10000, 3 * PAGE)
            assert asked == ["who has them", "other"]


async def test_whoever_lets_go_page_by_page_is_asked_as_often() -> None:
    async with pages_and_a_bar() as container:
        asked = 0

        def let_go_once(iova: int, size: int) -> None:
            nonlocal asked
            asked += 1
            container.unpin(0x10000, 1, user=user)

        with container.pin_user(let_go_once) as user:
            for _ in range(UNPIN_ROUNDS):
                container.pin(0x10000, 1, READ, user=user)
            await container.unmap(0x10000, 3 * PAGE)
            assert asked == UNPIN_ROUNDS


async def test_whoever_does_not_let_go_keeps_the_mapping() -> None:
    async with pages_and_a_bar() as container:
        asked = 0

        def keep(iova: int, size: int) -> None:
            nonlocal asked
            asked += 1

        with container.pin_user(keep) as user:
            (page,) = container.pin(0x10000, 1, READ, user=user)
            assert await refused(container.unmap(0x10000, 4 * PAGE)) == EBUSY
            assert await refused(container.protect(0x10000, 3 * PAGE, READ)) == EBUSY
            assert asked == 2 * UNPIN_ROUNDS
            assert len(container.entries) == 3
            assert bytes(page.view[:1]) == b"0"
        await container.unmap(0x10000, 4 * PAGE)


async def test_a_callback_may_unmap_what_is_being_unmapped() -> None:
    async with pages_and_a_bar() as container:

        async def unmap(iova: int, size: int) -> None:
            container.unpin(0x10000, 1, user=user)
            assert await container.unmap(iova, size) == size

        with container.pin_user(unmap) as user:
            container.pin(0x10000, 1, READ, user=user)
            assert await container.unmap(0x10000, 3 * PAGE) == 0, "nothing is left of it"


async def test_pages_that_are_pinned_count_as_locked_unless_they_count_already() -> None:
    async with believing() as (session, _), pages_and_a_bar(locked_limit=4 * PAGE) as container:
        with container.pin_user(nothing) as user:
            assert container.locked_pages == 0
            container.pin(0x10000, 3, READ, user=user)
            assert container.locked_pages == 3
            await container.attach(session)
            assert container.locked_pages == 4
            container.pin(0x13000, 1, READ, user=user)
            assert container.locked_pages == 4
            container.unpin(0x13000, 1, user=user)
            await container.detach(session)
            assert container.locked_pages == 3


async def test_one_page_more_than_may_be_locked_cannot_be_pinned() -> None:
    async with pages_and_a_bar(locked_limit=2 * PAGE + 1) as container:
        with container.pin_user(nothing) as user:
            assert refusal(container.pin, 0x10000, 3, READ, user=user) == ENOMEM
            assert container.locked_pages == 0
            container.pin(0x10000, 2, READ, user=user)
            container.pin(0x10000, 2, READ, user=user)
            assert refusal(container.pin, 0x12000, 1, READ, user=user) == ENOMEM


async def test_only_an_attached_device_can_say_that_it_pins() -> None:
    async with believing() as (session, _), open_container() as container:
        with pytest.raises(ContainerError) as caught:
            container.pin_user(nothing, session=session)
        assert caught.value.errno == ENODEV
