from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio

from client._eventfd import identity, is_eventfd, signal, take

FULL = 0xFFFF_FFFF_FFFF_FFFE


@pytest.fixture
def fd() -> Iterator[int]:
    """An eventfd that blocks."""
    made = os.eventfd(0)
    yield made
    os.close(made)


def test_a_signal_counts(fd: int) -> None:
    signal(fd)
    signal(fd)
    assert os.eventfd_read(fd) == 2


async def test_a_full_counter_does_not_block(fd: int) -> None:
    os.eventfd_write(fd, FULL)
    with trio.fail_after(5):
        await trio.to_thread.run_sync(signal, fd, abandon_on_cancel=True)
    assert os.eventfd_read(fd) == FULL


def test_other_descriptors_are_told_apart(fd: int) -> None:
    reader, writer = os.pipe()
    memory = os.memfd_create("eventfd")
    assert is_eventfd(fd)
    assert not any(is_eventfd(other) for other in (reader, writer, memory))
    for other in (reader, writer, memory):
        os.close(other)
    assert not is_eventfd(memory)


def test_what_was_counted_is_taken_once_and_nothing_blocks(fd: int) -> None:
    os.eventfd_write(fd, 3)
    assert take(fd) == 3
    assert take(fd) == 0


def test_all_descriptors_of_one_eventfd_have_its_identity_and_nothing_else_has(fd: int) -> None:
    copy, other = os.dup(fd), os.eventfd(0)
    memory = os.memfd_create("eventfd")
    assert identity(fd) is not None
    assert identity(copy) == identity(fd) != identity(other)
    assert identity(memory) is None
    for made in (copy, other, memory):
        os.close(made)
    assert identity(copy) is None
