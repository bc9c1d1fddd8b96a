"""A driver that goes on while its card is moved to another session."""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from errno import EINVAL

import pytest
import trio
import trio.testing

import client
from client.migration import MigrationError
from client.virtio import NetDriver, RxMode, Wiring, open_net
from tests.client.fake_mover import RUNNING, STOP, FakeMover
from tests.client.virtio.fake_nic import FakeNic, session_with_nic
from tests.descriptors import open_fds, settled_fds

WIRINGS = pytest.mark.parametrize("wiring", list(Wiring), ids=lambda wiring: wiring.value)


@dataclass
class Two:
    """Two cards, and the driver of the first."""

    old: FakeNic
    new: FakeNic
    first: client.Session
    second: client.Session
    driver: NetDriver


def movable(**options: object) -> FakeNic:
    """A card that can be moved."""
    nic = FakeNic(**options)  # type: ignore[arg-type]
    nic.mover = FakeMover(ahead=[b"who I am"], rest=b"what I was doing")
    return nic


@asynccontextmanager
async def two_cards(
    old: FakeNic | None = None, new: FakeNic | None = None, **options: object
) -> AsyncIterator[Two]:
    old, new = old or movable(), new or movable()
    new.origin = old
    with trio.fail_after(20):
        async with (
            session_with_nic(old) as first,
            session_with_nic(new) as second,
            open_net(first, **options) as driver,  # type: ignore[arg-type]
        ):
            yield Two(old, new, first, second, driver)


def numbered(number: int) -> bytes:
    return struct.pack("<I", number) * 15


@WIRINGS
async def test_frames_go_on_after_the_move(wiring: Wiring) -> None:
    async with two_cards(wiring=wiring) as two:
        for number in range(100):
            if number == 50:
                report = await two.driver.migrate_to(two.second)
                assert (report.bytes_precopy, report.bytes_stopcopy) == (8, 16)
                assert two.driver.session is two.second
            await two.driver.send(numbered(number))
            assert await two.driver.receive() == numbered(number)
        await two.driver.set_rx_mode(RxMode.PROMISCUOUS, True)
        assert len(two.new.commands) == 1
        assert two.driver.counters.sent == two.driver.counters.received == 100


class Traffic:
    """Numbered frames round the card, without end until `finish`."""

    def __init__(self, driver: NetDriver, nursery: trio.Nursery) -> None:
        self.driver = driver
        self.sent = 0
        self.got: list[bytes] = []
        self._last: int | None = None
        nursery.start_soon(self._send)
        nursery.start_soon(self._receive)

    async def _send(self) -> None:
        while self.sent != self._last:
            await self.driver.send(numbered(self.sent))
            self.sent += 1

    async def _receive(self) -> None:
        while len(self.got) != self._last:
            self.got.append(await self.driver.receive())

    async def wait(self, more: int) -> None:
        """Until so many further frames came."""
        until = len(self.got) + more
        while len(self.got) < until:
            await trio.lowlevel.checkpoint()

    def finish(self, more: int) -> None:
        """Stop after so many further frames."""
        self._last = self.sent + more

    @property
    def is_whole(self) -> bool:
        """Every frame came once and in its place."""
        return self.got == [numbered(number) for number in range(self.sent)]


@WIRINGS
async def test_no_frame_is_lost_or_doubled_while_the_card_moves(wiring: Wiring) -> None:
    async with two_cards(wiring=wiring) as two:
        async with trio.open_nursery() as nursery:
            traffic = Traffic(two.driver, nursery)
            await traffic.wait(100)
            await two.driver.migrate_to(two.second)
            await traffic.wait(100)
            traffic.finish(10)
        assert traffic.is_whole


@WIRINGS
async def test_what_happens_between_the_two_is_not_missed(wiring: Wiring) -> None:
    async with two_cards(wiring=wiring) as two, trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def receive() -> None:
            for _ in range(2):
                got.append(await two.driver.receive())

        async def command() -> None:
            await two.driver.set_rx_mode(RxMode.ALL_UNICAST, True)

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await two.driver.share_with(two.second)
        assert two.old.mover is not None
        assert two.new.mover is not None
        two.old.mover.state = STOP
        await two.driver.send(b"rings a card that stands still")
        nursery.start_soon(command)
        await trio.testing.wait_all_tasks_blocked()
        two.new.take_over(two.old)
        two.new.mover.state = RUNNING
        assert two.new.deliver(b"its interrupt goes nowhere" * 3)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        await two.driver.move_to(two.second)
        while len(got) < 2:
            await trio.lowlevel.checkpoint()
        assert got == [b"its interrupt goes nowhere" * 3, b"rings a card that stands still"]
    assert two.new.commands == [(0, 2, b"\1")]


async def test_a_changed_configuration_is_heard_after_the_move() -> None:
    async with two_cards() as two:
        two.new.link = 0
        assert two.driver.link_up
        await two.driver.migrate_to(two.second)
        await two.driver.wait_config_change()
        assert not two.driver.link_up


async def test_the_old_card_is_let_go_and_the_new_one_at_the_end() -> None:
    before = settled_fds()
    async with two_cards() as two:
        await two.driver.migrate_to(two.second)
        assert two.old.msix == {}
        assert sorted(two.new.msix) == [0, 1, 2, 3]
        assert two.new.statuses == [], "it was neither reset nor started"
        await two.driver.reset()
        await two.driver.send(b"x" * 60)
        assert await two.driver.receive() == b"x" * 60
    assert two.new.status == 0
    assert (two.old.windows, two.new.windows) == ({}, {})
    assert two.new.msix == {}
    assert open_fds() == before


async def test_the_driver_does_not_care_for_the_old_server_any_more() -> None:
    async with two_cards() as two:
        await two.driver.migrate_to(two.second)
        two.first.hang_up("moved away")
        await trio.testing.wait_all_tasks_blocked()
        await two.driver.send(b"x" * 60)
        assert await two.driver.receive() == b"x" * 60


async def test_a_card_moves_there_and_back() -> None:
    async with two_cards() as two:
        await two.driver.migrate_to(two.second)
        assert two.new.mover is not None
        two.old.origin = two.new
        two.new.mover.ahead, two.new.mover.rest = [], b"back"
        await two.driver.migrate_to(two.first)
        await two.driver.send(b"x" * 60)
        assert await two.driver.receive() == b"x" * 60
        assert two.driver.session is two.first


@WIRINGS
async def test_a_migration_that_fails_costs_no_frame(wiring: Wiring) -> None:
    new = movable()
    assert new.mover is not None
    new.mover.refuse = {RUNNING: EINVAL}
    async with two_cards(new=new, wiring=wiring) as two:
        async with trio.open_nursery() as nursery:
            traffic = Traffic(two.driver, nursery)
            await traffic.wait(50)
            with pytest.raises(MigrationError, match="starting the target"):
                await two.driver.migrate_to(two.second)
            assert two.driver.session is two.first
            await traffic.wait(50)
            traffic.finish(10)
        assert traffic.is_whole


async def test_a_card_with_fewer_vectors_is_no_place_to_go() -> None:
    async with two_cards(new=movable(vectors=2)) as two:
        with pytest.raises(client.DeviceError, match="fewer vectors"):
            await two.driver.migrate_to(two.second)
        assert two.driver.session is two.first


async def test_a_driver_that_cannot_follow_its_card_fails_and_the_card_is_reset() -> None:
    events = tuple(os.eventfd(0) for _ in range(3))
    async with two_cards(movable(doorbell_events=events), movable(), doorbells="eventfd") as two:
        with pytest.raises(client.ServerError, match="DEVICE_GET_REGION_IO_FDS"):
            await two.driver.migrate_to(two.second)
        assert two.new.status == 0
        with pytest.raises(client.DeviceError, match="could not follow"):
            await two.driver.send(b"x" * 60)
    for event in events:
        os.close(event)


async def test_a_driver_that_rings_eventfds_rings_those_of_the_new_card() -> None:
    events = [tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)) for _ in range(2)]
    old, new = (movable(doorbell_events=own) for own in events)
    async with two_cards(old, new, doorbells="eventfd") as two:
        await two.driver.migrate_to(two.second)
        for event in events[1]:
            assert os.eventfd_read(event) == 1, "every queue is notified once"
        await two.driver.send(b"x" * 60)
        assert os.eventfd_read(events[1][1]) == 1
    for event in (*events[0], *events[1]):
        os.close(event)
