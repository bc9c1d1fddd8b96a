"""The driver against a card written from the spec."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

import client
from client.virtio import ControlError, Feature, NetDriver, NetHeader, RxMode, Wiring, open_net
from tests.client.virtio.fake_nic import (
    ACCESS_PLATFORM,
    ALL,
    CTRL,
    CTRL_VQ,
    EVENT_IDX,
    MRG,
    NO_VECTOR,
    NOTIFY,
    RX,
    TX,
    VERSION_1,
    FakeNic,
    session_with_nic,
)
from tests.descriptors import open_fds, settled_fds

WIRINGS = pytest.mark.parametrize("wiring", list(Wiring), ids=lambda wiring: wiring.value)
PLAINEST = (VERSION_1,)


@asynccontextmanager
async def driving(nic: FakeNic, **options: object) -> AsyncIterator[NetDriver]:
    """The driver of a fake card, with a deadline over everything."""
    with trio.fail_after(20):
        async with session_with_nic(nic) as session, open_net(session, **options) as driver:  # type: ignore[arg-type]
            yield driver


@WIRINGS
@pytest.mark.parametrize("features", [ALL, PLAINEST], ids=["all", "plainest"])
async def test_frames_go_out_and_come_back(wiring: Wiring, features: tuple[int, ...]) -> None:
    async with driving(FakeNic(features=features), wiring=wiring) as driver:
        for number in range(300):
            frame = bytes([number & 0xFF]) * (14 + number)
            await driver.send(frame)
            assert await driver.receive() == frame
        assert driver.counters.sent == driver.counters.received == 300
        assert driver.counters.interrupts > 0


@WIRINGS
async def test_a_receiver_that_sleeps_is_woken(wiring: Wiring) -> None:
    nic = FakeNic()
    async with driving(nic, wiring=wiring) as driver, trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def listen() -> None:
            for _ in range(3):
                got.append(await driver.receive())

        nursery.start_soon(listen)
        for number in range(3):
            await trio.testing.wait_all_tasks_blocked()
            assert len(got) == number
            assert nic.deliver(bytes([number]) * 60)
            while len(got) == number:
                await trio.testing.wait_all_tasks_blocked()


@WIRINGS
@pytest.mark.parametrize("event_idx", [True, False], ids=["event index", "flags"])
async def test_a_full_queue_makes_the_sender_wait_and_nothing_is_lost(
    wiring: Wiring, event_idx: bool
) -> None:
    features = tuple(bit for bit in ALL if event_idx or bit != EVENT_IDX)
    nic = FakeNic(features=features, queue_size=16)
    frames = [struct.pack("<I", number) * 15 for number in range(200)]
    async with driving(nic, wiring=wiring) as driver, trio.open_nursery() as nursery:
        nursery.start_soon(driver.send_all, frames)
        assert [await driver.receive() for _ in frames] == frames


async def test_a_held_device_fills_the_queue() -> None:
    nic = FakeNic(queue_size=16)
    async with driving(nic) as driver:
        nic.hold = True
        assert driver.send_burst([b"x" * 60] * 20) == 16
        assert driver.send_burst([b"x" * 60]) == 0
        with trio.move_on_after(0.01) as scope:
            await driver.send(b"y" * 60)
        assert scope.cancelled_caught
        nic.hold = False
        nic.pump()
        await driver.send(b"z" * 60)
        got = [await driver.receive() for _ in range(17)]
        assert got == [b"x" * 60] * 16 + [b"z" * 60]


async def test_bursts_do_not_wait() -> None:
    async with driving(FakeNic()) as driver:
        assert driver.receive_burst() == []
        frames = [bytes([number]) * 100 for number in range(20)]
        assert driver.send_burst(frames, 5) == 15
        await driver.wait_receivable()
        got: list[bytes] = []
        while len(got) < 15:
            await trio.testing.wait_all_tasks_blocked()
            got += driver.receive_burst(4)
        assert got == frames[5:]
        assert driver.send_repeated(b"r" * 60, 10) == 10
        count = 0
        while count < 10:
            await trio.testing.wait_all_tasks_blocked()
            count += driver.discard()[0]


async def test_what_receive_took_ahead_is_not_lost_for_bursts() -> None:
    nic = FakeNic()
    async with driving(nic) as driver:
        for number in range(5):
            nic.deliver(bytes([number]) * 60)
        assert await driver.receive() == bytes([0]) * 60
        assert driver.receive_burst(2) == [bytes([1]) * 60, bytes([2]) * 60]
        assert driver.discard() == (2, 120)


async def test_two_tasks_may_receive() -> None:
    nic = FakeNic()
    async with driving(nic) as driver, trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def listen() -> None:
            got.append(await driver.receive())

        nursery.start_soon(listen)
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        nic.deliver(b"a" * 60)
        nic.deliver(b"b" * 60)
        while len(got) < 2:
            await trio.testing.wait_all_tasks_blocked()
        assert sorted(got) == [b"a" * 60, b"b" * 60]


@pytest.mark.parametrize("features", [ALL, tuple(bit for bit in ALL if bit != MRG)])
async def test_long_frames_pass_with_and_without_mergeable_buffers(features: tuple[int, ...]) -> None:
    nic = FakeNic(features=features)
    nic.mtu = 9000
    async with driving(nic, slot_size=1024) as driver:
        assert driver.mtu == 9000
        frame = os.urandom(9014)
        await driver.send(frame)
        assert await driver.receive() == frame


async def test_a_header_goes_out_as_given() -> None:
    nic = FakeNic()
    async with driving(nic, features=Feature.VERSION_1 | Feature.CSUM) as driver:
        nic.hold = True
        await driver.send(b"x" * 60, NetHeader(flags=1, csum_start=34, csum_offset=6))
        await trio.testing.wait_all_tasks_blocked()
        ring = nic.queues[TX].ring
        assert ring is not None
        assert ring.read(ring.take()[0])[:12] == bytes.fromhex("0100 0000 0000 2200 0600 0000")
        nic.deliver(b"y" * 60)
        header, frame = await driver.receive_with_header()
        assert (header.num_buffers, frame) == (1, b"y" * 60)


# starting and stopping


async def test_the_device_is_started_in_the_order_of_the_spec_and_left_reset() -> None:
    before = settled_fds()
    nic = FakeNic()
    async with driving(nic) as driver:
        assert nic.statuses == [0, 0, 1, 3, 11, 15]
        assert nic.config_vector == 0
        assert [queue.vector for queue in nic.queues] == [1, 2, 3]
        assert sorted(nic.msix) == [0, 1, 2, 3]
        assert struct.unpack_from("<H", nic.config, 4)[0] == 0x0406
        assert struct.unpack_from("<H", nic.config, 0x86)[0] == 0x8000
        assert driver.features >> ACCESS_PLATFORM & 1
        assert nic.features == int(driver.features)
        assert driver.mac == nic.mac
    assert nic.statuses[-1] == 0
    assert struct.unpack_from("<H", nic.config, 0x86)[0] == 0
    assert nic.msix == {}
    assert nic.windows == {}
    assert open_fds() == before


async def test_with_intx_no_vectors_are_set() -> None:
    nic = FakeNic()
    async with driving(nic, wiring=Wiring.INTX):
        assert nic.config_vector == NO_VECTOR
        assert {queue.vector for queue in nic.queues} == {NO_VECTOR}
        assert struct.unpack_from("<H", nic.config, 4)[0] == 0x0006
        assert nic.intx_fd >= 0


@pytest.mark.parametrize(
    ("vectors", "config", "queues"), [(3, 0, [1, 1, 1]), (2, 0, [1, 1, 1]), (1, 0, [0, 0, 0])]
)
async def test_few_vectors_are_shared(vectors: int, config: int, queues: list[int]) -> None:
    nic = FakeNic(vectors=vectors)
    async with driving(nic) as driver:
        assert nic.config_vector == config
        assert [queue.vector for queue in nic.queues] == queues
        await driver.send(b"x" * 60)
        assert await driver.receive() == b"x" * 60
        await driver.set_rx_mode(RxMode.PROMISCUOUS, True)
        nic.link = 0
        nic.change_config()
        await driver.wait_config_change()
        assert not driver.link_up


async def test_refused_vectors_are_an_error() -> None:
    nic = FakeNic()
    nic.refuse_vectors = True
    with pytest.raises(client.DeviceError, match="refuses vector"):
        async with driving(nic):
            pass
    assert nic.statuses[-1] == 0


async def test_a_legacy_device_is_refused() -> None:
    with pytest.raises(client.DeviceError, match="legacy"):
        async with driving(FakeNic(features=(MRG,))):
            pass


async def test_a_reset_starts_anew() -> None:
    nic = FakeNic()
    async with driving(nic) as driver:
        for _ in range(5):
            nic.hold = True
            driver.send_burst([b"lost" * 15] * 10)
            nic.hold = False
            await driver.reset()
            await driver.send(b"kept" * 15)
            assert await driver.receive() == b"kept" * 15
            await driver.set_rx_mode(RxMode.ALL_MULTICAST, True)


async def test_a_reset_wakes_who_waits() -> None:
    async with driving(FakeNic()) as driver, trio.open_nursery() as nursery:

        async def listen() -> None:
            with pytest.raises(client.ClientError, match="reset"):
                await driver.receive()

        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        await driver.reset()


async def test_the_doorbell_is_a_store_where_it_is_mapped() -> None:
    fd = os.memfd_create("bar")
    os.truncate(fd, 0x4000)
    with mmap.mmap(fd, 0x4000) as doorbells:
        nic = FakeNic(doorbell_fd=fd)
        async with driving(nic) as driver:
            doorbells[NOTIFY : NOTIFY + 16] = b"\xff" * 16
            await driver.send(b"x" * 60)
            assert doorbells[NOTIFY + 4 : NOTIFY + 8] == b"\1\0\xff\xff"
            assert nic.doorbells == []
            nic.pump()
            assert await driver.receive() == b"x" * 60
    os.close(fd)


async def test_the_doorbell_is_a_message_when_told_so_even_where_it_is_mapped() -> None:
    fd = os.memfd_create("bar")
    os.truncate(fd, 0x4000)
    nic = FakeNic(doorbell_fd=fd)
    async with driving(nic, doorbells="message") as driver:
        await driver.send(b"x" * 60)
        assert await driver.receive() == b"x" * 60
        while TX not in nic.doorbells:
            await trio.testing.wait_all_tasks_blocked()
    os.close(fd)


async def test_the_doorbell_is_an_eventfd_when_told_so() -> None:
    events = tuple(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
    before = settled_fds()
    nic = FakeNic(doorbell_events=events)
    async with driving(nic, doorbells="eventfd") as driver:
        os.eventfd_read(events[RX])
        await driver.send(b"x" * 60)
        assert os.eventfd_read(events[TX]) == 1
        assert nic.doorbells == []
        nic.pump()
        assert await driver.receive() == b"x" * 60
    assert open_fds() == before
    for event in events:
        os.close(event)


async def test_a_full_eventfd_neither_blocks_nor_fails_the_driver() -> None:
    events = tuple(os.eventfd(0) for _ in range(3))
    nic = FakeNic(doorbell_events=events)
    async with driving(nic, doorbells="eventfd") as driver:
        os.eventfd_write(events[TX], 0xFFFF_FFFF_FFFF_FFFE)
        await driver.send(b"x" * 60)
        nic.pump()
        assert await driver.receive() == b"x" * 60
    for event in events:
        os.close(event)


async def test_doorbells_that_have_no_eventfd_are_refused() -> None:
    with pytest.raises(client.ServerError, match="DEVICE_GET_REGION_IO_FDS"):
        async with driving(FakeNic(), doorbells="eventfd"):
            pass
    event = os.eventfd(0)
    with pytest.raises(client.DeviceError, match="doorbell of queue 1 has no eventfd"):
        async with driving(FakeNic(doorbell_events=(event,)), doorbells="eventfd"):
            pass
    os.close(event)


async def test_a_pipe_is_no_doorbell() -> None:
    reader, writer = os.pipe()
    with pytest.raises(client.DeviceError, match="doorbell of queue 0 has no eventfd"):
        async with driving(FakeNic(doorbell_events=(writer, writer, writer)), doorbells="eventfd"):
            pass
    os.close(reader)
    os.close(writer)


# control


@WIRINGS
async def test_control_commands_are_those_of_the_spec(wiring: Wiring) -> None:
    nic = FakeNic()
    async with driving(nic, wiring=wiring) as driver:
        await driver.set_rx_mode(RxMode.PROMISCUOUS, True)
        await driver.set_rx_mode(RxMode.NO_BROADCAST, False)
        await driver.set_mac(b"\2\0\0\0\0\7")
        await driver.set_mac_table([b"\2\0\0\0\0\1"], [b"\1\0\x5e\0\0\1", b"\1\0\x5e\0\0\2"])
        await driver.set_vlan(100, True)
        await driver.set_guest_offloads(Feature.GUEST_CSUM)
        assert nic.commands == [
            (0, 0, b"\1"),
            (0, 5, b"\0"),
            (1, 1, b"\2\0\0\0\0\7"),
            (1, 0, bytes.fromhex("01000000 020000000001 02000000 01005e000001 01005e000002")),
            (2, 0, b"\x64\0"),
            (5, 0, b"\2" + bytes(7)),
        ]
        assert driver.mac == b"\2\0\0\0\0\7"


async def test_a_refused_command_is_an_error() -> None:
    nic = FakeNic()
    async with driving(nic) as driver:
        nic.ack = 1
        with pytest.raises(ControlError, match=r"refuses control command 1\.1"):
            await driver.set_mac(b"\2\0\0\0\0\7")
        assert driver.mac == nic.mac


async def test_commands_that_are_given_up_leave_room_for_others() -> None:
    nic = FakeNic()
    async with driving(nic) as driver:
        nic.hold = True
        for _ in range(8):
            with trio.move_on_after(0.001):
                await driver.set_rx_mode(RxMode.PROMISCUOUS, True)
        with trio.move_on_after(0.01) as scope:
            await driver.set_rx_mode(RxMode.ALL_UNICAST, True)
        assert scope.cancelled_caught
        nic.hold = False
        nic.pump()
        await driver.set_rx_mode(RxMode.ALL_MULTICAST, True)
        assert nic.commands[-1] == (0, 1, b"\1")


async def test_a_device_without_control_queue_has_no_commands() -> None:
    async with driving(FakeNic(features=tuple(bit for bit in ALL if bit != CTRL_VQ))) as driver:
        assert Feature.CTRL_RX not in driver.features
        with pytest.raises(client.ClientError, match="no control queue"):
            await driver.set_rx_mode(RxMode.PROMISCUOUS, True)


async def test_a_reset_fails_commands_under_way() -> None:
    nic = FakeNic()
    async with driving(nic) as driver, trio.open_nursery() as nursery:
        nic.hold = True

        async def command() -> None:
            with pytest.raises(client.ClientError, match="reset"):
                await driver.set_rx_mode(RxMode.PROMISCUOUS, True)

        nursery.start_soon(command)
        await trio.testing.wait_all_tasks_blocked()
        await driver.reset()


# changes and failures


@WIRINGS
async def test_link_changes_are_heard(wiring: Wiring) -> None:
    nic = FakeNic()
    async with driving(nic, wiring=wiring) as driver:
        assert driver.link_up
        for up in (0, 1, 0):
            nic.link = up
            nic.change_config()
            await driver.wait_config_change()
            assert driver.link_up == bool(up)


async def test_each_announcement_is_acknowledged() -> None:
    nic = FakeNic()
    async with driving(nic) as driver:
        for _ in range(2):
            nic.link = 3
            nic.change_config()
            await driver.wait_config_change()
            await driver.set_rx_mode(RxMode.PROMISCUOUS, True)
        assert nic.commands == [(3, 0, b""), (0, 0, b"\1")] * 2


async def test_a_configuration_that_changes_meanwhile_is_read_again() -> None:
    nic = FakeNic()
    nic.generation_changes = 3
    async with driving(nic) as driver:
        assert driver.mac == nic.mac


async def test_a_device_that_needs_a_reset_gets_one() -> None:
    nic = FakeNic()
    async with driving(nic) as driver:
        nic.change_config(needs_reset=True)
        with pytest.raises(client.DeviceError, match="needs a reset"):
            await driver.receive()
        with pytest.raises(client.DeviceError, match="needs a reset"):
            await driver.send(b"x" * 60)
        await driver.reset()
        await driver.send(b"x" * 60)
        assert await driver.receive() == b"x" * 60


async def test_nonsense_in_a_ring_takes_the_driver_down_until_a_reset() -> None:
    nic = FakeNic()
    async with driving(nic) as driver:
        ring = nic.queues[RX].ring
        assert ring is not None
        ring.give((0xFFFF, 60))
        with pytest.raises(client.DeviceError, match="no chain"):
            await driver.receive()
        with pytest.raises(client.DeviceError, match="no chain"):
            await driver.send(b"x")
        await driver.reset()
        await driver.send(b"x" * 60)
        assert await driver.receive() == b"x" * 60


async def test_nonsense_in_the_control_queue_does_not_hang_a_command() -> None:
    nic = FakeNic()
    async with driving(nic) as driver, trio.open_nursery() as nursery:
        nic.hold = True

        async def command() -> None:
            with pytest.raises(client.ClientError):
                await driver.set_rx_mode(RxMode.PROMISCUOUS, True)

        nursery.start_soon(command)
        await trio.testing.wait_all_tasks_blocked()
        ring = nic.queues[CTRL].ring
        assert ring is not None
        ring.give((31, 60))
        os.eventfd_write(nic.msix[3], 1)
