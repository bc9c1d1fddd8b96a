from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import trio

from client._eventfd import is_eventfd, signal

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
