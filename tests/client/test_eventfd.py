from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest
import trio

from client._eventfd import identity, is_eventfd, make_eventfd, signal, take

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


def test_a_counter_that_fills_up_at_the_last_moment_is_a_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fd = make_eventfd()

    class Poll:
        """Finds room, which the server takes."""

        def register(self, fd: int, events: int) -> None:
            self.fd = fd

        def poll(self, timeout: int) -> list[tuple[int, int]]:
            os.eventfd_write(self.fd, FULL)
            return [(self.fd, select.POLLOUT)]

    with monkeypatch.context() as patch:
        patch.setattr(select, "poll", Poll)
        signal(fd)
    assert take(fd) == FULL
    os.close(fd)
