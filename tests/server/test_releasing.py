"""Clients that are asked to let go of their cards, in the order in which the kernel asks."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from server import Listener, Release, serve
from server.releasing import REPEAT_S
from tests.descriptors import no_fd_leaks
from tests.server.raw import EVENTFD, REQ, SET_IRQS, TRIGGER, RawClient, connect, irqs
from tests.server.world import Card, World, world


@pytest.fixture
def release() -> Release:
    return Release()


@pytest.fixture
def fds() -> Iterator[list[int]]:
    """Eventfds for REQ, there before a server counts descriptors."""
    made = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    yield made
    for fd in made:
        os.close(fd)


@pytest.fixture
async def served(tmp_path: Path, release: Release, fds: list[int]) -> AsyncIterator[World]:
    async with world(tmp_path, by=partial(serve, release=release)) as made:
        yield made


async def listen(client: RawClient, fd: int) -> None:
    """Wire the client's REQ interrupt."""
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, REQ, 0, 1), [fd])


def heard(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


async def test_a_client_is_asked_again_and_again_until_it_lets_go(
    served: World, release: Release, fds: list[int], autojump_clock: trio.testing.MockClock
) -> None:
    client, fd = await served.client(), fds[0]
    await listen(client, fd)
    assert heard(fd) == 0
    start = trio.current_time()
    release.ask()
    release.ask()
    for times in range(3):
        await trio.lowlevel.wait_readable(fd)
        assert heard(fd) == 1
        assert trio.current_time() - start == times * REPEAT_S
    await client.read(7, 0, 4)  # the card goes on working meanwhile
    client.close()
    await trio.testing.wait_all_tasks_blocked()
    assert not served.path.exists(), "serve has returned"


async def test_serving_ends_with_the_last_client_and_takes_no_new_one(
    tmp_path: Path, fds: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    release = Release()
    with no_fd_leaks():
        cards = [Card(f"card{number}") for number in range(3)]
        places = [(card.function, tmp_path / card.function.name) for card in cards]
        async with trio.open_nursery() as nursery:

            async def start(task_status: trio.TaskStatus[None]) -> None:
                await serve(places, release=release, task_status=task_status)

            await nursery.start(start)
            clients = [await connect(path) for _, path in places[:2]]
            for client, fd in zip(clients, fds, strict=True):
                (await client.negotiate()).close()
                await listen(client, fd)
            release.ask()
            clients[0].close()
            await trio.testing.wait_all_tasks_blocked()
            late = await connect(places[0][1])
            clients[1].close()
        assert await late.hung_up(), "nobody took it in"
        late.close()
        for card in cards:
            card.function.close()
    assert not any(path.exists() for _, path in places)
    assert [record.getMessage() for record in caplog.records if "asked" in record.getMessage()] == [
        f"{name}: client asked to let go" for name in ("card0", "card1")
    ]


async def test_a_client_that_cannot_be_asked_is_waited_for_and_may_listen_later(
    served: World,
    release: Release,
    fds: list[int],
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, fd = await served.client(), fds[0]
    release.ask()
    await trio.testing.wait_all_tasks_blocked()
    assert "card: its client cannot be asked to let go (no REQ); waiting" in caplog.text
    await listen(client, fd)
    await trio.lowlevel.wait_readable(fd)
    assert heard(fd) == 1


async def test_a_client_that_comes_at_the_very_moment_of_asking_is_not_taken_in(
    served: World, release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = Listener.accept

    async def accept_as_somebody_asks(listener: Listener) -> socket.socket:
        client = await accept(listener)
        release.ask()
        return client

    monkeypatch.setattr(Listener, "accept", accept_as_somebody_asks)
    (await served.client()).close()  # the one that is awaited already comes before
    await trio.testing.wait_all_tasks_blocked()
    client = await served.connect()
    await trio.testing.wait_all_tasks_blocked()
    assert not served.path.exists(), "serve has returned"
    assert await client.hung_up()


async def test_serving_ends_at_once_where_there_is_no_client(tmp_path: Path, release: Release) -> None:
    card = Card()
    release.ask()
    await serve([(card.function, tmp_path / "card.sock")], release=release)
    card.function.close()


async def test_serving_that_is_not_released_goes_on_when_a_client_leaves(
    served: World, release: Release, fds: list[int]
) -> None:
    client, fd = await served.client(), fds[0]
    await listen(client, fd)
    client.close()
    await served.client()
    assert not release.asked
    assert heard(fd) == 0
