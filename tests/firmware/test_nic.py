"""The whole card in this process: a driver at its registers, a port at its other end."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from device.function import IrqKind, ResetKind
from device.profiles import COMMON, PROFILES, Profile
from device.virtio.features import Feature
from device.virtio.net import RX_QUEUE, TX_QUEUE
from device.virtio.transport import Status
from firmware import Nic
from firmware.nic import random_mac
from firmware.ports import Framing, Offload, Port, open_port, quote
from tests.descriptors import settled_fds
from tests.firmware.driver import CONFIG_REGION, CONFIG_VECTOR, HEADER, Driver, driver_of

MAC = bytes.fromhex("525400000001")
OTHER = bytes.fromhex("525400000002")
CSUM = Feature.NET_CSUM | Feature.NET_GUEST_CSUM
TSO4 = Feature.NET_HOST_TSO4 | Feature.NET_GUEST_TSO4
TSO6 = Feature.NET_HOST_TSO6 | Feature.NET_GUEST_TSO6
ECN = Feature.NET_HOST_ECN | Feature.NET_GUEST_ECN

NOTHING, EVERYTHING = Offload(0), ~Offload(0)
PATIENCE_S = 60.0  # what does not come until then hangs; a busy machine is only slow


def frame(payload: bytes = b"payload", target: bytes = MAC) -> bytes:
    return target + bytes.fromhex("525400000099") + b"\x08\x00" + payload


class Cable(Port):
    """A port whose other end is the test's, `network`; what happens to it is remembered."""

    kind = "cable"

    def __init__(
        self,
        *,
        offloads: Offload = NOTHING,
        mtu: int | None = None,
        header: int = 0,
        framing: Framing = Framing.PACKETS,
    ) -> None:
        super().__init__("cable")
        self.offloads, self.mtu, self.vnet_header_size, self.framing = offloads, mtu, header, framing
        self.happened: list[object] = []
        self.running = False
        self.plug()

    def plug(self) -> None:
        kind = socket.SOCK_STREAM if self.framing is Framing.STREAM else socket.SOCK_SEQPACKET
        self.network, self._card = socket.socketpair(socket.AF_UNIX, kind)
        self.network.setblocking(False)
        self._card.setblocking(False)
        self.fd = self._card.fileno()
        self.link_up = True
        self.on_change()

    def lose(self) -> None:
        """The other end goes; the data path has to notice."""
        self.network.close()

    def set_link(self, up: bool) -> None:
        self.link_up = up
        self.on_change()

    def set_offloads(self, accepted: Offload) -> None:
        self.happened.append(accepted)

    def peer_lost(self) -> None:
        self.happened.append("lost")
        self.fd, self.link_up = -1, False
        self.on_change()
        self._card.close()

    async def run(self) -> None:
        self.running = True
        try:
            await super().run()
        finally:
            self.running = False

    def close(self) -> None:
        self.happened.append("closed")
        self.network.close()
        self._card.close()


@pytest.fixture
def cable() -> Iterator[Cable]:
    made = Cable()
    yield made
    made.close()


@pytest.fixture
def driver(cable: Cable) -> Iterator[Driver]:
    with driver_of(Nic(cable, mac=MAC)) as made:
        yield made


@pytest.fixture
def make_driver() -> Iterator[Callable[..., Driver]]:
    """A driver of a card on a port of the test's choice."""
    made: list[Driver] = []

    def make(port: Port, **options: int | bool | bytes | None) -> Driver:
        made.append(Driver(Nic(port, **{"mac": MAC, **options})))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for driver in made:
        driver.nic.close()
        driver.close()


# --- what the card shows


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_a_profile_withholds_what_it_says_and_takes_no_driver_that_asks_for_it(profile: Profile) -> None:
    with driver_of(Nic(Cable(), mac=MAC)) as driver:
        full = driver.offered
    with driver_of(Nic(Cable(), mac=MAC, profile=profile)) as driver:
        assert driver.offered == full & ~profile.withholds
        assert driver.negotiate(full, insist=True) == (not profile.withholds)


def test_the_card_shows_its_address_mtu_and_link(make_driver: Callable[..., Driver]) -> None:
    driver = make_driver(Cable(), mtu=9000)
    assert (driver.mac, driver.mtu, driver.link_up) == (MAC, 9000, True)


@pytest.mark.parametrize(
    ("port", "mtu", "shown"), [(None, None, 1500), (1400, None, 1400), (1400, 1300, 1300)]
)
def test_the_mtu_is_the_ports_unless_another_is_asked_for(
    make_driver: Callable[..., Driver], port: int | None, mtu: int | None, shown: int
) -> None:
    assert make_driver(Cable(mtu=port), mtu=mtu).mtu == shown


def test_without_an_address_the_card_takes_one_of_its_own() -> None:
    macs = {random_mac() for _ in range(100)}
    assert len(macs) == 100
    assert all(len(mac) == 6 and mac[0] & 3 == 2 for mac in macs)
    with driver_of(Nic(Cable())) as driver:
        assert driver.mac[0] & 3 == 2


@pytest.mark.parametrize("mac", [b"", MAC[:5], MAC + b"\0", bytes(6), b"\xff" * 6, b"\x01\0\x5e\0\0\1"])
def test_what_is_no_address_of_an_interface_is_refused(cable: Cable, mac: bytes) -> None:
    with pytest.raises(ValueError, match="6 octets, unicast, not zero"):
        Nic(cable, mac=mac)


@pytest.mark.parametrize("mtu", [-1, 0, 67, 65536])
def test_what_is_no_mtu_is_refused(cable: Cable, mtu: int) -> None:
    with pytest.raises(ValueError, match="68 to 65535"):
        Nic(cable, mtu=mtu)


@pytest.mark.parametrize("mtu", [68, 65535])
def test_the_least_and_the_greatest_mtu_are_taken(make_driver: Callable[..., Driver], mtu: int) -> None:
    assert make_driver(Cable(), mtu=mtu).mtu == mtu


# --- features


@pytest.mark.parametrize(
    ("offloads", "offered"),
    [
        (Offload(0), CSUM),
        (Offload.CSUM, CSUM),
        (Offload.CSUM | Offload.TSO4, CSUM | TSO4),
        (Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN, CSUM | TSO4 | TSO6 | ECN),
    ],
)
def test_what_the_port_can_do_the_card_offers(
    make_driver: Callable[..., Driver], offloads: Offload, offered: Feature
) -> None:
    assert make_driver(Cable(offloads=offloads)).offered & (CSUM | TSO4 | TSO6 | ECN) == offered


def test_offloads_may_be_left_out(make_driver: Callable[..., Driver]) -> None:
    driver = make_driver(Cable(offloads=EVERYTHING), offloads=False)
    assert not driver.offered & (CSUM | TSO4 | TSO6 | ECN)


def test_whatever_the_port_the_card_offers_what_every_driver_uses(driver: Driver) -> None:
    always = Feature.VERSION_1 | Feature.NET_MAC | Feature.NET_STATUS | Feature.NET_MTU | Feature.NET_CTRL_VQ
    assert driver.offered & always == always


@pytest.mark.parametrize("without", [Feature.VERSION_1, CSUM, Feature.NET_CTRL_VQ])
def test_features_that_do_not_fit_together_are_not_agreed_on(
    make_driver: Callable[..., Driver], without: Feature
) -> None:
    driver = make_driver(Cable(offloads=EVERYTHING))
    assert not driver.negotiate(~without)
    assert driver.negotiate()


def test_what_was_not_offered_cannot_be_had(driver: Driver) -> None:
    assert not driver.negotiate(Feature.VERSION_1 | Feature.NET_HOST_TSO4 | Feature.NET_CSUM, insist=True)


@pytest.mark.parametrize(
    ("accepted", "told"),
    [
        (~Feature(0), Offload.CSUM | Offload.TSO4 | Offload.TSO6 | Offload.ECN),
        (~(TSO6 | ECN), Offload.CSUM | Offload.TSO4),
        (~(TSO4 | TSO6 | ECN), Offload.CSUM),
        (~(CSUM | TSO4 | TSO6 | ECN), Offload(0)),
    ],
)
def test_the_port_is_told_what_the_driver_takes(
    make_driver: Callable[..., Driver], accepted: Feature, told: Offload
) -> None:
    cable = Cable(offloads=EVERYTHING, header=12)
    driver = make_driver(cable)
    driver.start(accepted)
    assert cable.happened == [told]
    driver.status = 0
    assert cable.happened == [told, Offload(0)]


# --- frames


def test_frames_go_both_ways(cable: Cable, driver: Driver) -> None:
    driver.start()
    driver.send(frame(b"out"))
    cable.network.send(frame(b"in"))
    driver.settle()
    assert cable.network.recv(2000) == frame(b"out")
    assert driver.received() == [frame(b"in")]
    assert driver.fired(RX_QUEUE)
    assert driver.fired(TX_QUEUE)
    assert not driver.fired(CONFIG_VECTOR)


def test_before_the_driver_is_ready_frames_wait_in_the_port(cable: Cable, driver: Driver) -> None:
    cable.network.send(frame(b"early"))
    driver.settle()
    driver.start()
    driver.settle()
    assert driver.received() == [frame(b"early")]


def test_after_a_reset_the_rings_are_left_alone(cable: Cable, driver: Driver) -> None:
    driver.start()
    driver.status = 0
    driver.send(frame())
    cable.network.send(frame())
    driver.settle()
    assert driver.tx.used() == driver.rx.used() == []
    with pytest.raises(BlockingIOError):
        cable.network.recv(2000)


@pytest.mark.parametrize("kind", list(ResetKind))
def test_a_reset_of_the_function_is_one_of_the_driver(cable: Cable, driver: Driver, kind: ResetKind) -> None:
    driver.start()
    driver.function.reset(kind)
    assert driver.status == 0
    assert cable.happened == [Offload.CSUM, Offload(0)]


def test_a_driver_may_come_back(cable: Cable, driver: Driver) -> None:
    driver.start()
    driver.status = 0
    for ring in driver.rings:
        ring.__post_init__()
        ring.avail_index = ring.used_seen = 0
        driver.memory.write(ring.driver, bytes(4))
        driver.memory.write(ring.device, bytes(4))
    driver.start()
    driver.send(frame(b"again"))
    driver.settle()
    assert cable.network.recv(2000) == frame(b"again")


# --- the control queue


def test_a_new_address_shows_and_filters_until_the_reset(cable: Cable, driver: Driver) -> None:
    driver.start()
    assert driver.command(b"\0\0\0") == 0
    assert driver.command(b"\1\1" + OTHER) == 0
    assert driver.mac == OTHER
    assert driver.fired(2)
    cable.network.send(frame(b"to the old one", MAC))
    cable.network.send(frame(b"to the new one", OTHER))
    driver.settle()
    assert driver.received() == [frame(b"to the new one", OTHER)]
    driver.status = 0
    assert driver.mac == MAC


def test_an_address_that_changes_is_a_new_generation_of_the_configuration(driver: Driver) -> None:
    driver.start()
    before = driver.read(COMMON + 0x15, 1)
    driver.command(b"\1\1" + OTHER)
    assert driver.read(COMMON + 0x15, 1) != before
    assert not driver.fired(CONFIG_VECTOR)


def test_commands_wait_for_the_driver_to_be_ready(driver: Driver) -> None:
    driver.command(b"\1\1" + OTHER)
    assert driver.mac == MAC
    driver.start()
    assert driver.mac == OTHER


def test_a_command_without_room_for_an_answer_needs_a_reset(driver: Driver) -> None:
    driver.start()
    assert driver.command(b"\0\0\1", room=0) is None
    assert driver.status & Status.NEEDS_RESET
    assert driver.fired(CONFIG_VECTOR)


def test_a_control_queue_that_broke_off_is_left_alone_until_the_reset(
    driver: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.start()
    for _ in range(3):
        assert driver.command(b"\0\0\1", room=0) is None
    assert len([record for record in caplog.records if "control queue" in record.message]) == 1
    assert driver.command(b"\1\1" + OTHER) is None


async def test_commands_beyond_a_ringful_are_executed_later(
    driver: Driver, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start()
    queue = driver.nic.control
    rounds: list[bool] = []
    service = queue.service

    def one_more() -> bool:
        wanted = service()
        rounds.append(queue.unfinished)
        queue.unfinished = len(rounds) < 3
        return wanted

    monkeypatch.setattr(queue, "service", one_more)
    driver.command(b"\1\1" + OTHER)
    assert len(rounds) == 1
    with trio.fail_after(PATIENCE_S):
        while len(rounds) < 3:
            await trio.testing.wait_all_tasks_blocked()


# --- bus mastering


def test_without_bus_mastering_the_card_touches_no_memory(cable: Cable, driver: Driver) -> None:
    driver.start()
    driver.function.region_write(CONFIG_REGION, 4, b"\2\0")
    driver.send(frame(b"out"))
    cable.network.send(frame(b"in"))
    assert driver.command(b"\1\1" + OTHER) is None
    driver.settle()
    assert driver.received() == []
    assert driver.tx.used() == []
    assert driver.nic.datapath.awaited == 0
    driver.function.region_write(CONFIG_REGION, 4, b"\6\0")
    driver.settle()
    assert cable.network.recv(2000) == frame(b"out")
    assert driver.received() == [frame(b"in")]
    assert driver.mac == OTHER


async def test_a_running_card_goes_on_when_it_may_master_the_bus_again(
    cable: Cable, driver: Driver, nursery: trio.Nursery
) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start()
    driver.function.region_write(CONFIG_REGION, 4, b"\2\0")
    cable.network.send(frame(b"later"))
    await trio.testing.wait_all_tasks_blocked()
    driver.function.region_write(CONFIG_REGION, 4, b"\6\0")
    with trio.fail_after(PATIENCE_S):
        assert await driver.receive() == frame(b"later")


# --- the link


def test_a_link_that_changes_shows_and_interrupts(cable: Cable, driver: Driver) -> None:
    driver.start()
    for up in (False, True):
        generation = driver.read(COMMON + 0x15, 1)
        cable.set_link(up)
        assert driver.link_up is up
        assert driver.fired(CONFIG_VECTOR)
        assert driver.read(COMMON + 0x15, 1) != generation


def test_a_link_that_stays_as_it_is_says_nothing(cable: Cable, driver: Driver) -> None:
    driver.start()
    cable.set_link(True)
    assert not driver.fired(CONFIG_VECTOR)


def test_a_driver_that_is_not_ready_is_not_interrupted(cable: Cable, driver: Driver) -> None:
    cable.set_link(False)
    assert not driver.fired(CONFIG_VECTOR)
    assert not driver.link_up


def test_a_port_without_a_peer_makes_a_card_without_a_link(make_driver: Callable[..., Driver]) -> None:
    cable = Cable()
    cable.link_up = False
    assert not make_driver(cable).link_up


def test_while_the_cable_is_out_no_frame_passes(cable: Cable, driver: Driver) -> None:
    driver.start()
    driver.nic.set_link(False)
    driver.send(frame())
    cable.network.send(frame())
    driver.settle()
    assert len(driver.tx.used()) == 1
    assert driver.rx.used() == []
    driver.nic.set_link(True)
    driver.send(frame(b"after"))
    driver.settle()
    assert cable.network.recv(2000) == frame(b"after")


def test_a_link_that_flaps_loses_no_frame_that_waits_for_buffers(cable: Cable, driver: Driver) -> None:
    driver.start(buffers=1)
    cable.network.send(frame(bytes(3000)))
    driver.settle()
    assert driver.rx.used() == []
    cable.set_link(False)
    cable.set_link(True)
    driver.offer(1)
    driver.settle()
    assert sum(written for _, written in driver.rx.used()) == HEADER + len(frame(bytes(3000)))


def test_a_half_read_stream_survives_a_word_about_the_link(make_driver: Callable[..., Driver]) -> None:
    cable = Cable(framing=Framing.STREAM)
    driver = make_driver(cable)
    driver.start()
    data = struct.pack("!I", len(frame())) + frame()
    cable.network.send(data[:10])
    driver.settle()
    cable.set_link(True)
    cable.network.send(data[10:])
    driver.settle()
    assert driver.received() == [frame()]


# --- what goes wrong


def test_a_lost_peer_is_a_link_that_is_down(cable: Cable, driver: Driver) -> None:
    driver.start()
    cable.lose()
    driver.settle()
    driver.nic._look_after()
    assert cable.happened[-1] == "lost"
    assert not driver.link_up
    assert driver.fired(CONFIG_VECTOR)
    driver.send(frame())
    driver.settle()
    assert len(driver.tx.used()) == 1


def test_a_peer_that_comes_back_is_used(cable: Cable, driver: Driver) -> None:
    driver.start()
    cable.lose()
    driver.settle()
    driver.nic._look_after()
    cable.plug()
    driver.send(frame(b"back"))
    driver.settle()
    assert driver.link_up
    assert cable.network.recv(2000) == frame(b"back")


@pytest.mark.parametrize("broken", ["rx", "tx"])
def test_a_broken_queue_needs_a_reset(driver: Driver, broken: str) -> None:
    driver.start()
    ring = driver.rx if broken == "rx" else driver.tx
    ring.avail_index = (ring.avail_index + 1000) & 0xFFFF
    driver.memory.write(ring.driver + 2, struct.pack("<H", ring.avail_index))
    if broken == "rx":
        driver.nic.port.network.send(frame())  # type: ignore[attr-defined]
    driver.settle()
    driver.nic._look_after()
    assert driver.status & Status.NEEDS_RESET
    assert driver.fired(CONFIG_VECTOR)
    driver.status = 0
    assert driver.status == 0


def test_rings_outside_of_memory_need_a_reset_or_stay_silent(driver: Driver) -> None:
    assert driver.negotiate()
    driver.write(COMMON + 0x16, 2, TX_QUEUE)
    driver.write(COMMON + 0x20, 8, 1 << 50)
    driver.write(COMMON + 0x1C, 2, 1)
    driver.status = driver.status | Status.DRIVER_OK
    driver.ring_doorbell(TX_QUEUE)
    driver.settle()
    driver.nic._look_after()


def test_a_client_that_truncates_the_cards_memory_is_refused(driver: Driver) -> None:
    memory = driver.function.regions()[2]
    assert memory.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, 0)
    assert driver.function.region_read(2, 0, 4) == bytes(4)


def test_every_access_to_the_registers_is_answered(driver: Driver) -> None:
    for count in (1, 2, 4, 8):
        for offset in range(0, 0x8000, 0x100):
            assert len(driver.function.region_read(0, offset, count)) == count


# --- running


async def test_a_running_card_serves_its_doorbells(
    cable: Cable, driver: Driver, nursery: trio.Nursery
) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start()
    with trio.fail_after(PATIENCE_S):
        for n in range(20):
            driver.send(frame(bytes([n])))
            await trio.lowlevel.wait_readable(cable.network)
            assert cable.network.recv(2000) == frame(bytes([n]))
            cable.network.send(frame(bytes([n])))
            assert await driver.receive() == frame(bytes([n]))


async def test_a_loopback_card_answers_itself(
    make_driver: Callable[..., Driver], nursery: trio.Nursery
) -> None:
    driver = make_driver(open_port("loopback"))
    nursery.start_soon(driver.nic.run)
    driver.start()
    driver.send(frame(b"echo"))
    with trio.fail_after(PATIENCE_S):
        assert await driver.receive() == frame(b"echo")


async def test_a_running_card_notices_a_lost_peer(
    cable: Cable, driver: Driver, nursery: trio.Nursery
) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start()
    cable.lose()
    with trio.fail_after(PATIENCE_S):
        await driver.interrupted(CONFIG_VECTOR)
    assert not driver.link_up
    assert cable.happened[-1] == "lost"


async def test_a_lost_peer_lets_the_worker_sleep(cable: Cable, driver: Driver, nursery: trio.Nursery) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start()
    cable.lose()
    with trio.fail_after(PATIENCE_S):
        await driver.interrupted(CONFIG_VECTOR)
    await trio.testing.wait_all_tasks_blocked(0.05)
    before = driver.nic.datapath.counters()["sleeps"]
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert driver.nic.datapath.counters()["sleeps"] - before < 5
    assert cable.happened.count("lost") == 1


async def test_a_running_card_reports_a_broken_queue(driver: Driver, nursery: trio.Nursery) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start()
    driver.tx.make_available(999)
    driver.ring_doorbell(TX_QUEUE)
    with trio.fail_after(PATIENCE_S):
        await driver.interrupted(CONFIG_VECTOR)
    assert driver.status & Status.NEEDS_RESET


async def test_a_card_runs_until_it_is_cancelled_and_may_run_again(cable: Cable, driver: Driver) -> None:
    threads = threading.active_count()
    driver.start()
    for n in range(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.nic.run)
            await trio.testing.wait_all_tasks_blocked()
            assert cable.running
            driver.send(frame(bytes([n])))
            with trio.fail_after(PATIENCE_S):
                await trio.lowlevel.wait_readable(cable.network)
            assert cable.network.recv(2000) == frame(bytes([n]))
            nursery.cancel_scope.cancel()
        assert not cable.running
    assert threading.active_count() <= threads + 1  # trio keeps one for the next one


async def test_a_card_cancelled_before_it_began_may_run_still(cable: Cable, driver: Driver) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await driver.nic.run()
    driver.start()
    driver.send(frame())
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.nic.run)
            await trio.lowlevel.wait_readable(cable.network)
            nursery.cancel_scope.cancel()


def test_a_closed_card_has_let_go_of_everything() -> None:
    before = settled_fds()
    for _ in range(3):
        cable = Cable()
        with driver_of(Nic(cable)) as driver:
            driver.start()
        assert cable.happened[-1] == "closed"
        del cable, driver
    assert settled_fds() == before  # the worker's two go with the object


# --- two cards and a wire


async def test_two_cards_are_wired_together_and_again_after_one_has_gone(
    tmp_path: Path, make_driver: Callable[..., Driver], nursery: trio.Nursery
) -> None:
    wire = quote(str(tmp_path / "wire.sock"))
    left = make_driver(open_port(f"stream:listen={wire}"))
    nursery.start_soon(left.nic.run)
    left.start()
    assert not left.link_up
    for _ in range(2):
        with driver_of(Nic(open_port(f"stream:path={wire}"), mac=OTHER)) as right:
            async with trio.open_nursery() as running:
                running.start_soon(right.nic.run)
                right.start()
                with trio.fail_after(PATIENCE_S):
                    await left.interrupted(CONFIG_VECTOR)
                    assert left.link_up
                    for n in range(50):
                        left.send(frame(bytes([n]) * 1000, OTHER))
                        assert await right.receive() == frame(bytes([n]) * 1000, OTHER)
                        right.send(frame(bytes([n]) * 60))
                        assert await left.receive() == frame(bytes([n]) * 60)
                running.cancel_scope.cancel()
        with trio.fail_after(PATIENCE_S):
            await left.interrupted(CONFIG_VECTOR)
        assert not left.link_up


async def test_what_a_card_sends_is_in_the_file_and_what_is_in_a_file_comes(
    tmp_path: Path, make_driver: Callable[..., Driver]
) -> None:
    file = quote(str(tmp_path / "frames.pcap"))
    sent = [frame(bytes([n]) * 100) for n in range(100)]
    with driver_of(Nic(open_port(f"pcap:write={file}"))) as driver:
        driver.start()
        for each in sent:
            driver.send(each)
            driver.settle()
            driver.tx.used()
    driver = make_driver(open_port(f"pcap:read={file},speed=max"))
    received: list[bytes] = []
    async with trio.open_nursery() as running:
        running.start_soon(driver.nic.run)
        driver.start()
        with trio.fail_after(PATIENCE_S):
            while len(received) < len(sent):
                driver.rx.set_used_event(driver.rx.used_seen)
                if not (new := driver.received()):
                    await driver.interrupted(RX_QUEUE)
                received += new
        running.cancel_scope.cancel()
    assert received == sent


# --- errors that nobody recovers from


class Failing(Cable):
    """A port whose background work fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = trio.Event()

    async def run(self) -> None:
        await self.broken.wait()
        raise RuntimeError("a mistake in the port's code")


@pytest.fixture
def err() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    yield fd
    os.close(fd)


async def test_a_card_that_fails_tells_its_client_before_anybody_else(
    make_driver: Callable[..., Driver], err: int, caplog: pytest.LogCaptureFixture
) -> None:
    port = Failing()
    driver = make_driver(port)
    driver.function.irq_set_trigger(IrqKind.ERR, 0, [err])
    port.broken.set()
    with pytest.raises(ExceptionGroup) as failed:
        await driver.nic.run()
    assert failed.group_contains(RuntimeError, match="a mistake in the port's code")
    assert os.eventfd_read(err) == 1
    assert "nic0: the card failed, and its client was told (ERR)" in caplog.text


async def test_a_card_that_is_ended_reports_no_error(driver: Driver, err: int) -> None:
    driver.function.irq_set_trigger(IrqKind.ERR, 0, [err])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.nic.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(err)
