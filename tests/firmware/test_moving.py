"""A whole card that moves: what its driver sees, while it is stopped and after; and who is refused."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.function import ResetKind
from device.migration.states import DeviceState
from device.profiles import C5000X, COMMON, DEVICE_CONFIG, N3000, VIRTIO, parse_profile
from device.virtio.features import Feature
from device.virtio.net import RX_QUEUE, TX_QUEUE
from device.virtio.transport import Status
from firmware import Nic
from firmware._cable import LOOPBACK_BUFFER
from firmware.ports._port import MAX_FRAME
from tests.device.migration.moves import load, migration_of, saved
from tests.firmware.driver import ALL, CONFIG_REGION, CONFIG_VECTOR, Driver
from tests.firmware.test_nic import MAC, OTHER, Cable, frame
from tests.firmware.travellers import NONE_OWED, loopback, number, numbered, travelling

S = DeviceState
CARRIED = LOOPBACK_BUFFER + 4 + 12 + MAX_FRAME  # bytes of frames that go along with a card


# --- what the driver sees


def test_registers_are_the_same_at_the_other_end() -> None:
    with travelling(lambda: Nic(Cable(), mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start(ALL & ~Feature.NET_GUEST_ANNOUNCE)
        driver.command(b"\1\1" + OTHER)
        driver.write(COMMON + 0x16, 2, 1)
        driver.write(COMMON, 4, 1)
        before = driver.function.region_read(0, 0, 0x1000) + driver.function.region_read(0, 0x2000, 0x1000)
        config = driver.function.region_read(CONFIG_REGION, 0, 4096)
        travellers.move(travellers.another(lambda: Nic(Cable(), mac=OTHER)))
        assert driver.function.region_read(0, 0, 0x1000) + driver.function.region_read(0, 0x2000, 0x1000) == (
            before
        )
        assert driver.function.region_read(CONFIG_REGION, 0, 4096) == config
        assert driver.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
        assert [driver.nic.card.queues[n].last_avail for n in range(3)] == [0, 0, 1]


def test_the_driver_is_interrupted_once_for_everything() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        travellers.move(travellers.another())
        assert [driver.fired(vector) for vector in range(4)] == [True] * 4
        assert [driver.fired(vector) for vector in range(4)] == [False] * 4


def test_the_address_goes_along_and_comes_back_on_resets_of_the_driver() -> None:
    with travelling(lambda: Nic(Cable(), mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start()
        driver.command(b"\1\1" + bytes.fromhex("525400000077"))
        other = travellers.another(lambda: Nic(Cable(), mac=OTHER))
        travellers.move(other)
        assert driver.mac == bytes.fromhex("525400000077")
        driver.status = 0
        assert driver.mac == MAC
        other.function.reset(ResetKind.DEVICE)
        assert driver.mac == MAC
        other.function.reset(ResetKind.LOST_CLIENT)
        assert driver.mac == OTHER


def test_receive_modes_and_tables_go_along() -> None:
    with travelling(lambda: Nic(Cable(), mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start()
        group, stranger = bytes.fromhex("01005e000001"), bytes.fromhex("01005e000002")
        driver.command(b"\0\0\0")
        driver.command(b"\1\0" + struct.pack("<I", 1) + OTHER + struct.pack("<I", 1) + group)
        travellers.move(travellers.another())
        accept = driver.nic.filter.accept
        assert [accept(frame(b"", to)) for to in (MAC, OTHER, group, stranger)] == [True, True, True, False]


@pytest.mark.parametrize(("here", "there"), [(True, False), (False, True), (True, True)])
def test_the_link_is_that_of_the_port_at_the_other_end(here: bool, there: bool) -> None:
    def make(up: bool) -> Nic:
        cable = Cable()
        cable.link_up = up
        return Nic(cable, mac=MAC)

    with travelling(lambda: make(here)) as travellers:
        driver = travellers.driver
        driver.start(ALL & ~Feature.NET_GUEST_ANNOUNCE)
        generation = driver.read(COMMON + 0x15, 1)
        travellers.move(travellers.another(lambda: make(there)))
        assert driver.link_up is there
        assert (driver.read(COMMON + 0x15, 1) != generation) == (here != there)


ANNOUNCE_ACK = b"\3\0"
REFUSED = 1


def announces(driver: Driver) -> bool:
    """Whether the driver is asked to announce itself (virtio 1.3, 5.1.4)."""
    return bool(driver.read(DEVICE_CONFIG + 6, 2) & 2)


def test_a_driver_that_has_moved_is_asked_to_announce_itself_until_it_has() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        assert not announces(driver)
        assert driver.command(ANNOUNCE_ACK) == REFUSED
        generation = driver.read(COMMON + 0x15, 1)
        travellers.move(travellers.another())
        assert driver.fired(CONFIG_VECTOR)
        assert announces(driver)
        assert driver.link_up
        asked = driver.read(COMMON + 0x15, 1)
        assert asked != generation
        assert driver.command(ANNOUNCE_ACK) == 0
        assert not announces(driver)
        assert driver.read(COMMON + 0x15, 1) != asked
        assert driver.command(ANNOUNCE_ACK) == REFUSED
        assert driver.link_up
        for state in (S.STOP, S.RUNNING):
            migration_of(driver.function).set_state(state)
        assert not announces(driver), "it has not moved since"


def test_a_driver_that_moves_again_before_it_has_announced_itself_is_asked_still() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        travellers.move(travellers.another())
        travellers.move(travellers.another())
        assert announces(driver)
        driver.status = 0
        assert not announces(driver)


def test_a_driver_that_cannot_announce_itself_is_not_asked() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start(ALL & ~Feature.NET_GUEST_ANNOUNCE)
        travellers.move(travellers.another())
        assert not announces(driver)


def test_a_driver_that_is_not_ready_yet_is_not_asked_later() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        assert driver.negotiate()
        travellers.move(travellers.another())
        assert not announces(driver)
        driver.start()
        assert not announces(driver)


def test_a_driver_that_starts_on_a_card_before_it_runs_again_is_not_asked() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        target = travellers.another()
        migration = migration_of(target.function)
        migration.set_state(S.RESUMING)
        migration.write(saved(driver.function))
        migration.set_state(S.STOP)
        driver.nic, driver.function = target, target.function
        driver.start()
        migration.set_state(S.RUNNING)
        assert not announces(driver)


def test_a_card_that_stays_where_it_is_asks_for_nothing() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        saved(driver.function)
        migration_of(driver.function).set_state(S.RUNNING)
        assert driver.fired(CONFIG_VECTOR)
        assert not announces(driver)


def test_features_go_to_the_port_at_the_other_end() -> None:
    with travelling(lambda: Nic(Cable(), mac=MAC)) as travellers:
        travellers.driver.start()
        cable = Cable()
        travellers.move(travellers.another(lambda: Nic(cable, mac=MAC)))
        assert cable.happened == [travellers.cards[0].port.happened[0]]  # type: ignore[attr-defined]


def test_a_card_without_a_driver_moves_too() -> None:
    with travelling(loopback) as travellers:
        assert travellers.driver.negotiate()
        travellers.move(travellers.another())
        assert travellers.driver.status & Status.FEATURES_OK
        travellers.driver.start()
        travellers.driver.send(numbered(1))
        travellers.driver.settle()
        assert [number(data) for data in travellers.driver.received()] == [1]


def test_a_broken_queue_stays_broken() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        driver.tx.make_available(driver.tx.size)
        driver.settle()
        assert driver.nic.card.queues[TX_QUEUE].fault
        travellers.move(travellers.another())
        assert driver.status & Status.NEEDS_RESET
        assert driver.nic.card.queues[TX_QUEUE].fault


def test_a_broken_control_queue_stays_broken() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        assert driver.command(b"\0\0\1", room=0) is None
        travellers.move(travellers.another())
        assert driver.status & Status.NEEDS_RESET
        assert driver.command(b"\1\1" + OTHER) is None


# --- while it is stopped


@pytest.mark.parametrize("state", [S.STOP, S.STOP_COPY, S.RESUMING])
def test_a_stopped_card_touches_neither_memory_nor_port(state: DeviceState) -> None:
    cable = Cable()
    with travelling(lambda: Nic(cable, mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start()
        for vector in range(4):
            driver.fired(vector)
        migration_of(driver.function).set_state(state)
        memory = driver.memory.bytes[:]
        driver.send(frame(b"out"))
        cable.network.send(frame(b"in"))
        sent = driver.memory.bytes[:]
        driver.ring_doorbell(RX_QUEUE)
        assert driver.command(b"\1\1" + OTHER) is None
        driver.settle()
        assert memory != sent
        assert driver.rx.used() == driver.tx.used() == []
        assert driver.nic.datapath.awaited == 0
        with pytest.raises(BlockingIOError):
            cable.network.recv(2000)
        cable.set_link(False)
        cable.set_link(True)
        assert not any(driver.fired(vector) for vector in range(4))
        if state is S.RESUMING:
            return
        migration_of(driver.function).set_state(S.RUNNING)
        driver.settle()
        assert cable.network.recv(2000) == frame(b"out")
        assert driver.received() == [frame(b"in")]
        assert driver.mac == OTHER


def test_a_link_that_changes_while_the_card_is_stopped_is_told_when_it_runs() -> None:
    cable = Cable()
    with travelling(lambda: Nic(cable, mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start()
        migration_of(driver.function).set_state(S.STOP)
        cable.set_link(False)
        assert driver.link_up
        migration_of(driver.function).set_state(S.RUNNING)
        assert not driver.link_up
        assert driver.fired(CONFIG_VECTOR)


def test_a_port_that_comes_back_while_the_card_is_stopped_is_attached_when_it_runs() -> None:
    cable = Cable()
    with travelling(lambda: Nic(cable, mac=MAC)) as travellers:
        driver = travellers.driver
        driver.start()
        migration_of(driver.function).set_state(S.STOP)
        cable.peer_lost()
        cable.network.close()
        cable.plug()
        cable.on_change()
        migration_of(driver.function).set_state(S.RUNNING)
        driver.send(frame(b"out"))
        driver.settle()
        assert cable.network.recv(2000) == frame(b"out")


def test_a_driver_that_resets_a_stopped_card_finds_it_reset() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        driver.start()
        migration_of(driver.function).set_state(S.STOP)
        driver.status = 0
        assert driver.negotiate()
        migration_of(driver.function).set_state(S.RUNNING)
        assert driver.status & Status.FEATURES_OK


# --- who is refused


@pytest.mark.parametrize(
    ("other", "trait"),
    [
        (lambda: Nic(Cable(), mac=MAC, mtu=1400), "mtu=1400"),
        (
            lambda: Nic(Cable(), mac=MAC, profile=replace(N3000, queue_size=128)),
            "profile=n3000:queue-size=128",
        ),
        (lambda: Nic(Cable(), mac=MAC, offloads=False), "features="),
        (lambda: Nic(Cable(), mac=MAC, profile=C5000X), "profile=c5000x"),
        (lambda: Nic(Cable(), mac=MAC, profile=VIRTIO), "profile=virtio"),
        (
            lambda: Nic(Cable(), mac=MAC, profile=parse_profile("n3000:vectors=one")),
            "profile=n3000:vectors=one",
        ),
        (lambda: Nic(Cable(), mac=MAC, profile=parse_profile("n3000:lm=hidden")), "profile=n3000:lm=hidden"),
        (lambda: Nic(Cable(), mac=MAC, msix=False), "capabilities="),
        (lambda: Nic(Cable(), mac=MAC, bar2_size=1 << 16), "bars="),
    ],
)
def test_a_card_that_differs_is_refused_and_told_in_what(other: Callable[[], Nic], trait: str) -> None:
    with travelling(lambda: Nic(Cable(), mac=MAC)) as travellers:
        travellers.driver.start()
        wired = trait not in ("capabilities=", "profile=n3000:vectors=one")  # the others have all vectors
        nic = travellers.another(other) if wired else other()
        stream = saved(travellers.driver.function)
        with pytest.raises(DeviceError, match=trait) as refusal:
            load(nic.function, stream)
        assert refusal.value.errno == errno.EINVAL
        migration_of(travellers.driver.function).set_state(S.RUNNING)
        travellers.driver.send(frame(b"still here"))
        travellers.driver.settle()
        port = travellers.cards[0].port
        assert isinstance(port, Cable)
        assert port.network.recv(2000) == frame(b"still here")
        if nic not in travellers.cards:
            nic.close()


def test_a_card_can_take_a_card_with_another_address() -> None:
    with travelling(lambda: Nic(Cable(), mac=MAC)) as travellers:
        travellers.move(travellers.another(lambda: Nic(Cable(), mac=OTHER)))
        assert travellers.driver.mac == MAC


@given(st.binary(max_size=40))
def test_any_bytes_are_a_cards_state_or_refused(data: bytes) -> None:
    with travelling(loopback) as travellers:
        nic = travellers.driver.nic
        try:
            apply = nic.stage(data)
        except ValueError:
            return
        apply()
        assert nic.save() == data


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<6s6sHB", MAC, b"\1" + MAC[1:], 0, 0),
        struct.pack("<6s6sHB", MAC, bytes(6), 0, 0),
        struct.pack("<6s6sHB", MAC, MAC, 4, 0),
        struct.pack("<6s6sHB", MAC, MAC, 0x8001, 0),
        struct.pack("<6s6sHB", MAC, MAC, 1, 2),
    ],
    ids=["multicast", "no address", "one bit too high", "a status that is none", "broken and more"],
)
def test_what_no_card_shows_its_driver_is_refused(data: bytes) -> None:
    with travelling(loopback) as travellers:
        nic = travellers.driver.nic
        nic.stage(struct.pack("<6s6sHB", MAC, MAC, 1, 1))
        with pytest.raises(ValueError, match="no card"):
            nic.stage(data)


FRAME = struct.pack("<I", 26) + bytes(26)


@pytest.mark.parametrize(
    "data",
    [
        FRAME[:3],
        FRAME[:-1],
        FRAME + b"\0",
        struct.pack("<I", 25) + bytes(25),
        struct.pack("<I", 12 + MAX_FRAME + 1) + bytes(12 + MAX_FRAME + 1),
        FRAME * (CARRIED // len(FRAME) + 1),
    ],
    ids=["no length", "cut off", "trailing", "too short", "too long", "too many"],
)
def test_frames_that_no_card_has_are_refused(data: bytes) -> None:
    with travelling(loopback) as travellers:
        datapath = travellers.driver.nic.datapath
        for good in (b"", FRAME, struct.pack("<I", 12 + MAX_FRAME) + bytes(12 + MAX_FRAME)):
            datapath.stage(NONE_OWED + good)()
            assert datapath.save() == NONE_OWED + good
        datapath.stage(NONE_OWED + FRAME * (CARRIED // len(FRAME)))
        with pytest.raises(ValueError, match="bytes"):
            datapath.stage(NONE_OWED + data)
