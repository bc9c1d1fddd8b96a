"""A card that moves while frames are on their way: each arrives once."""

from __future__ import annotations

import itertools
import socket
import struct

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from device.migration.states import DeviceState
from device.virtio.features import Feature
from device.virtio.net import RX_QUEUE
from firmware import Nic
from firmware.ports import Framing
from tests.device.migration.moves import migration_of
from tests.firmware.test_nic import MAC, Cable
from tests.firmware.travellers import NONE_OWED, loopback, number, numbered, travelling

S = DeviceState


def test_frames_move_a_hundred_times_and_each_arrives_once() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start(buffers=8)
        numbers = itertools.count()
        sent: list[int] = []
        arrived: list[int] = []
        other = travellers.another()
        for turn in range(100):
            for _ in range(5):
                sent.append(next(numbers))
                driver.send(numbered(sent[-1], 60 + turn * 10))
            for _ in range(turn % 4):
                driver.nic.datapath.service()
            if turn % 3 == 0:
                arrived += [number(data) for data in driver.received()]
            left = driver.nic
            travellers.move(other, ahead=turn % 2 == 0)
            travellers.welcome(left)
            other = left
        driver.settle()
        while news := driver.received():
            arrived += [number(data) for data in news]
            driver.settle()
        assert arrived == sent


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["send", "serve", "receive", "move", "ahead", "stop", "command"]), max_size=60)
)
def test_wherever_it_moves_nothing_is_lost_or_doubled(steps: list[str]) -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start(Feature(0) | ~Feature.RING_EVENT_IDX if len(steps) % 2 else ~Feature(0), buffers=1)
        numbers = itertools.count()
        sent: list[int] = []
        arrived: list[int] = []
        other = travellers.another()
        for step in steps:
            match step:
                case "send":
                    sent.append(next(numbers))
                    driver.send(numbered(sent[-1]))
                case "serve":
                    driver.nic.datapath.service()
                case "receive":
                    arrived += [number(data) for data in driver.received()]
                case "move" | "ahead":
                    left = driver.nic
                    travellers.move(other, ahead=step == "ahead")
                    travellers.welcome(left)
                    other = left
                case "stop":
                    migration_of(driver.function).set_state(S.STOP)
                    driver.nic.datapath.service()
                    migration_of(driver.function).set_state(S.RUNNING)
                case "command":
                    assert driver.command(b"\0\0\1") == 0
        driver.settle()
        while news := driver.received():
            arrived += [number(data) for data in news]
            driver.settle()
        assert arrived == sent


async def test_running_cards_hand_their_traffic_over(nursery: trio.Nursery) -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        other = travellers.another()
        async with trio.open_nursery() as inner:
            inner.start_soon(driver.nic.run)
            inner.start_soon(other.run)
            driver.start()
            sent: list[int] = []
            arrived: list[int] = []
            with trio.fail_after(60):
                for turn in range(30):
                    for _ in range(3):
                        sent.append(len(sent))
                        driver.send(numbered(sent[-1]))
                    left = driver.nic
                    travellers.move(other, ahead=turn % 2 == 0)
                    travellers.welcome(left)
                    other = left
                    while len(arrived) < len(sent):
                        driver.rx.set_used_event(driver.rx.used_seen)
                        if news := driver.received():
                            arrived += [number(data) for data in news]
                        else:
                            await driver.interrupted(RX_QUEUE)
            inner.cancel_scope.cancel()
        assert arrived == sent


def network_of(nic: Nic) -> socket.socket:
    assert isinstance(nic.port, Cable)
    return nic.port.network


def test_a_frame_that_waits_for_more_buffers_goes_along() -> None:
    with travelling(lambda: Nic(Cable(), mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start(buffers=1)
        network_of(driver.nic).send(numbered(7, 3000))
        driver.settle()
        assert driver.rx.used() == []
        travellers.move(travellers.another())
        driver.offer(1)
        driver.settle()
        assert [written for _, written in driver.rx.used()] == [2048, 12 + 14 + 3000 - 2048]


def test_frames_that_the_card_has_read_of_a_stream_go_along() -> None:
    with travelling(lambda: Nic(Cable(framing=Framing.STREAM), mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start(buffers=1)
        for value in range(4):
            data = numbered(value)
            network_of(driver.nic).send(struct.pack(">I", len(data)) + data)
        network_of(driver.nic).send(b"\0\0\0\x40 a frame that has come in part")
        driver.settle()
        travellers.move(travellers.another())
        data = numbered(4)
        network_of(driver.nic).send(struct.pack(">I", len(data)) + data)
        arrived = []
        driver.settle()
        while news := driver.received():
            arrived += [number(data) for data in news]
            driver.settle()
        assert arrived == list(range(5))


def test_what_came_along_goes_on_with_the_next_move_and_ends_with_the_driver() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start(buffers=1)
        for value in range(3):
            driver.send(numbered(value))
        driver.settle()
        for _ in range(3):
            travellers.move(travellers.another())
        waiting = driver.nic.datapath.save()
        assert len(waiting) == len(NONE_OWED) + 2 * (4 + 12 + len(numbered(0)))
        driver.status = 0
        assert driver.nic.datapath.save() == NONE_OWED
