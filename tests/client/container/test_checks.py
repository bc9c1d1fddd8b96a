"""Which of several errors is told: that which the kernel looks for first."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from errno import EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, ENOSPC, EOPNOTSUPP, EOVERFLOW

import pytest

from client.container import ContainerError, Mode, PageMemory, open_container
from client.container._checks import Place, check_place, check_range
from protocol.vfio import DmaMapFlags
from tests.client.container.believer import believing, refused, some_of, with_bar

NONE, READ, BOTH = DmaMapFlags(0), DmaMapFlags.READ, DmaMapFlags.READ | DmaMapFlags.WRITE
FINE = Place(0x10000, 0x2000, 0x1000, BOTH, page=0x1000, overlaps=False, full=False)
HOLE = 0xFEE0_0000


@dataclass(frozen=True)
class Mistake:
    name: str
    errno: int
    changes: Mapping[str, int]


FLAGS = {"flags": DmaMapFlags(8)}
TYPE1 = [
    Mistake("unknown flags", EINVAL, FLAGS),
    Mistake("empty", EINVAL, {"size": 0}),
    Mistake("wraps", EOVERFLOW, {"iova": (1 << 64) - 0x1000}),
    Mistake("offset wraps", EOVERFLOW, {"offset": (1 << 64) - 0x1000}),
    Mistake("no permissions", EINVAL, {"flags": NONE}),
    Mistake("misaligned", EINVAL, {"iova": 0x10800}),
    Mistake("overlaps", EEXIST, {"overlaps": True}),
    Mistake("full", ENOSPC, {"full": True}),
    Mistake("hole", EINVAL, {"iova": HOLE}),
]
IOMMUFD = [
    Mistake("unknown flags", EOPNOTSUPP, FLAGS),
    Mistake("outside", EOVERFLOW, {"iova": (1 << 64) - 1}),
    Mistake("no permissions", EINVAL, {"flags": NONE}),
    Mistake("misaligned size", EINVAL, {"size": 0x1800}),
    Mistake("wraps", EOVERFLOW, {"iova": (1 << 64) - 0x1000}),
    Mistake("hole", EINVAL, {"iova": HOLE}),
    Mistake("overlaps", EEXIST, {"overlaps": True}),
    Mistake("misaligned offset", EINVAL, {"offset": 0x1800}),
]


def errno_of(mode: Mode, place: Place) -> int:
    with pytest.raises(ContainerError) as caught:
        check_place(mode, place)
    return caught.value.errno


def pairs(mistakes: list[Mistake]) -> list[tuple[Mistake, Mistake]]:
    """Those that can be made together, the earlier first."""
    return [
        (first, second)
        for at, first in enumerate(mistakes)
        for second in mistakes[at + 1 :]
        if not first.changes.keys() & second.changes.keys()
    ]


MODES_AND_MISTAKES = [
    *((mode, one) for mode in (Mode.TYPE1, Mode.TYPE1V2) for one in TYPE1),
    *((Mode.IOMMUFD, one) for one in IOMMUFD),
]
MODES_AND_PAIRS = [
    *((mode, *pair) for mode in (Mode.TYPE1, Mode.TYPE1V2) for pair in pairs(TYPE1)),
    *((Mode.IOMMUFD, *pair) for pair in pairs(IOMMUFD)),
]


@pytest.mark.parametrize("mode", list(Mode))
def test_what_is_right_is_not_refused(mode: Mode) -> None:
    check_place(mode, FINE)
    check_place(mode, replace(FINE, iova=0, flags=READ))
    check_place(mode, replace(FINE, iova=(1 << 64) - 0x3000))
    check_place(mode, replace(FINE, iova=HOLE - FINE.size))


@pytest.mark.parametrize(
    ("mode", "mistake"),
    MODES_AND_MISTAKES,
    ids=lambda one: one.name if isinstance(one, Mistake) else one.value,
)
def test_each_mistake_has_the_kernels_errno(mode: Mode, mistake: Mistake) -> None:
    assert errno_of(mode, replace(FINE, **mistake.changes)) == mistake.errno  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "first", "second"),
    MODES_AND_PAIRS,
    ids=lambda one: one.name if isinstance(one, Mistake) else one.value,
)
def test_of_two_mistakes_the_kernels_first_is_told(mode: Mode, first: Mistake, second: Mistake) -> None:
    both = {**first.changes, **second.changes}
    assert errno_of(mode, replace(FINE, **both)) == first.errno  # type: ignore[arg-type]


def test_the_last_page_below_the_end_is_an_address_but_in_iommufd_its_last_byte_is_not() -> None:
    check_place(Mode.TYPE1V2, replace(FINE, iova=(1 << 64) - FINE.size))
    check_place(Mode.IOMMUFD, replace(FINE, iova=(1 << 64) - FINE.size))
    assert errno_of(Mode.IOMMUFD, replace(FINE, size=(1 << 64) - 1)) == EOVERFLOW


def test_iommufd_does_not_limit_how_many_there_are() -> None:
    check_place(Mode.IOMMUFD, replace(FINE, full=True))


@pytest.mark.parametrize(
    ("mode", "iova", "size", "errno"),
    [
        (Mode.TYPE1V2, 1 << 64, 0x800, EOVERFLOW),  # beyond, before it is misaligned
        (Mode.TYPE1V2, -0x1000, 0x1000, EOVERFLOW),
        (Mode.TYPE1V2, 0x800, 0, EINVAL),
        (Mode.TYPE1V2, 0x1000, 0, EINVAL),
        (Mode.TYPE1V2, 0x1000, 0x800, EINVAL),
        (Mode.TYPE1V2, (1 << 64) - 0x1000, 0x2800, EINVAL),  # misaligned, before it wraps
        (Mode.TYPE1V2, (1 << 64) - 0x1000, 0x2000, EOVERFLOW),
        (Mode.TYPE1, 0x800, 0x1000, EINVAL),
        (Mode.IOMMUFD, 0x800, 0, EINVAL),
        (Mode.IOMMUFD, (1 << 64) - 0x1000, 0x2800, EOVERFLOW),
        (Mode.IOMMUFD, 0x801, 0x33, None),
        (Mode.TYPE1V2, 0, 1 << 63, None),
        (Mode.TYPE1V2, 0, 1 << 64, None),
    ],
)
def test_what_can_be_unmapped_is_a_range(mode: Mode, iova: int, size: int, errno: int | None) -> None:
    if errno is None:
        check_range(mode, iova, size, 0x1000)
    else:
        with pytest.raises(ContainerError) as caught:
            check_range(mode, iova, size, 0x1000)
        assert caught.value.errno == errno


async def test_places_are_checked_before_the_memory_is_counted_and_a_bar_is_looked_at_last() -> None:
    async with (
        with_bar() as (owner, _, mapping),
        believing() as (session, server),
        open_container(locked_limit=0x1000, entry_limit=1) as container,
    ):
        await container.attach(session)
        with PageMemory.allocate(0x2000) as memory:
            assert await refused(container.map(HOLE, memory)) == EINVAL
            assert await refused(container.map(0x1000, memory)) == ENOMEM
            await container.map(0x1000, memory.part(0, 0x1000))
            assert await refused(container.map(0x1000, memory)) == EEXIST
            assert await refused(container.map(HOLE, memory)) == ENOSPC
            await container.unmap(0x1000, 0x1000)
            owner.hang_up("enough")
            assert await refused(container.map(HOLE, some_of(mapping))) == EINVAL
            assert await refused(container.map(0x1000, some_of(mapping))) == EFAULT
            assert len(server.told) == 2


async def test_iommufd_checks_the_place_of_a_bar_that_it_does_not_take() -> None:
    async with with_bar() as (_, _, mapping), open_container(Mode.IOMMUFD) as container:
        assert await refused(container.map(HOLE, some_of(mapping))) == EINVAL
        assert await refused(container.map(0x1000, some_of(mapping))) == EFAULT


async def test_unmapping_in_iommufd_says_where_nothing_is() -> None:
    async with open_container(Mode.IOMMUFD) as container:
        assert await refused(container.unmap(0x1000, 0)) == EINVAL
        assert await refused(container.unmap(0x1000, 0x1000)) == ENOENT


def test_an_error_has_its_name_in_it() -> None:
    with pytest.raises(ContainerError, match=re.escape("0x10000: something is mapped there")) as caught:
        check_place(Mode.TYPE1V2, replace(FINE, overlaps=True))
    assert "[EEXIST]" in str(caught.value)
