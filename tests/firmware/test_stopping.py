"""Queues that are stopped and go on, as the IFC VF's drivers do it: nothing is lost, nothing comes twice."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.profiles import COMMON, LIVE_MIGRATION_BAR
from device.virtio.net import CONTROL_QUEUE, RX_QUEUE, TX_QUEUE
from device.virtio.transport import Status
from firmware import Nic
from tests.device.migration.moves import move
from tests.device.remote_side import Ask, Client, client_of, map_by_message
from tests.firmware.driver import CONFIG_VECTOR, HEADER, Driver
from tests.firmware.test_nic import MAC, OTHER, Cable, frame

RING_STATE = (0x20, 0x24, 0x60)
SELECT, SIZE, VECTOR, ENABLE = 0x16, 0x18, 0x1A, 0x1C
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK

RESTORING: dict[str, Callable[[int], int]] = {
    "as it was": lambda state: state,  # 2019's driver
    "avail := used": lambda state: state >> 16 | state & 0xFFFF0000,  # DPDK's, for network cards
    "last_avail alone": lambda state: state & 0xFFFF,  # Linux's, by 16 bits
}


class Stopper(Driver):
    """A driver that stops queues and starts them again."""

    def __init__(self, cable: Cable, *, ring_size: int = 64) -> None:
        super().__init__(Nic(cable, mac=MAC), ring_size=ring_size)
        self.cable = cable

    def state(self, queue: int) -> int:
        raw = self.function.region_read(LIVE_MIGRATION_BAR, RING_STATE[queue], 4)
        return int.from_bytes(raw, "little")

    def enabled(self, queue: int) -> bool:
        self.write(COMMON + SELECT, 2, queue)
        return self.read(COMMON + ENABLE, 2) == 1

    def stop(self, queue: int) -> None:
        self.write(COMMON + SELECT, 2, queue)
        self.write(COMMON + ENABLE, 2, 0)

    def restore(self, queue: int, state: int, way: str = "as it was") -> None:
        """Set where it goes on, and enable it with what the card still knows."""
        width = 2 if way == "last_avail alone" else 4
        at = 0x20 + 4 * queue if width == 2 else RING_STATE[queue]
        self.function.region_write(LIVE_MIGRATION_BAR, at, RESTORING[way](state).to_bytes(width, "little"))
        self.write(COMMON + SELECT, 2, queue)
        self.write(COMMON + ENABLE, 2, 1)

    def start_over(self, states: list[int], way: str) -> None:
        """Reset the card, and have every queue go on where it was."""
        assert self.negotiate(self.features)
        self.write(COMMON + 0x10, 2, CONFIG_VECTOR)
        for number, ring in enumerate(self.rings):
            self.write(COMMON + SELECT, 2, number)
            self.write(COMMON + SIZE, 2, ring.size)
            self.write(COMMON + VECTOR, 2, number)
            for offset, address in zip((0x20, 0x28, 0x30), ring.addresses, strict=True):
                self.write(COMMON + offset, 8, address)
            self.restore(number, states[number], way)
        self.status = READY

    def sent(self) -> list[bytes]:
        """What has come to the network."""
        frames = []
        while True:
            try:
                frames.append(self.cable.network.recv(4000, socket.MSG_DONTWAIT))
            except BlockingIOError:
                return frames


@contextmanager
def stopper(ring_size: int = 64) -> Iterator[Stopper]:
    cable = Cable()
    driver = Stopper(cable, ring_size=ring_size)
    try:
        yield driver
    finally:
        driver.nic.close()
        driver.close()
        cable.network.close()


def numbered(number: int) -> bytes:
    return frame(number.to_bytes(4, "little") + bytes(46))


# --- the whole card, its memory here


rounds = st.lists(
    st.tuples(
        st.integers(0, 6),  # frames sent before the stop, all of them seen by the card
        st.integers(0, 6),  # and those that lie in the ring when it is stopped
        st.integers(0, 6),  # frames received
        st.sampled_from([*RESTORING]),
        st.booleans(),  # whether the card is reset in between
    ),
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(begin=st.sampled_from([0, 0xFFF8, 0x7FFF]), rounds=rounds)
def test_frames_go_out_and_come_in_once_whatever_is_stopped_and_restored(
    begin: int, rounds: list[tuple[int, int, int, str, bool]]
) -> None:
    """From any place in the indices' circle; each queue is stopped with work left in its ring."""
    numbers = count()
    with stopper(16) as driver:
        driver.start(buffers=0)
        place_rings(driver, begin)
        driver.offer(8)
        for now, later, arriving, way, reset in rounds:
            out = [numbered(next(numbers)) for _ in range(now + later)]
            for one in out[:now]:
                driver.send(one)
            driver.settle()
            for one in out[now:]:
                driver.send(one)
            into = [numbered(next(numbers)) for _ in range(arriving)]
            for one in into:
                driver.cable.network.send(one)
            for queue in (RX_QUEUE, TX_QUEUE, CONTROL_QUEUE):
                driver.stop(queue)
                assert not driver.enabled(queue)
            driver.settle()
            assert driver.sent() == out[:now], "a queue that is stopped sends nothing"
            assert driver.received() == []
            states = [driver.state(queue) for queue in range(3)]
            for state in states:
                assert state & 0xFFFF == state >> 16, "nothing is in flight"
            if reset:
                driver.start_over(states, way)
            else:
                for queue in range(3):
                    driver.restore(queue, states[queue], way)
            driver.settle()
            assert driver.sent() == out[now:], "without another doorbell"
            assert driver.received() == into
            driver.tx.used()
            assert len(driver.tx.free) == driver.tx.size, "each came back once"


def place_rings(driver: Stopper, begin: int) -> None:
    """Have the two rings of frames begin at that index."""
    for queue, ring in ((RX_QUEUE, driver.rx), (TX_QUEUE, driver.tx)):
        driver.stop(queue)
        ring.avail_index = ring.used_seen = begin
        driver.memory.write(ring.driver + 2, begin.to_bytes(2, "little"))
        driver.memory.write(ring.device + 2, begin.to_bytes(2, "little"))
        driver.restore(queue, begin << 16 | begin)
        assert driver.state(queue) == begin << 16 | begin


def test_a_queue_that_is_enabled_while_the_card_runs_looks_at_its_ring_at_once() -> None:
    with stopper() as driver:
        driver.start(buffers=0)
        driver.settle()
        driver.stop(TX_QUEUE)
        driver.send(frame(b"waiting"))
        kicks = driver.nic.datapath.counters()["kicks"]
        driver.restore(TX_QUEUE, driver.state(TX_QUEUE))
        assert driver.nic.datapath.counters()["kicks"] == kicks + 1
        driver.settle()
        assert driver.sent() == [frame(b"waiting")]


def test_a_command_that_waits_when_the_control_queue_is_stopped_is_executed_when_it_goes_on() -> None:
    with stopper() as driver:
        driver.start(buffers=0)
        driver.stop(CONTROL_QUEUE)
        assert driver.command(b"\1\1", OTHER) is None
        assert driver.mac == MAC
        driver.restore(CONTROL_QUEUE, driver.state(CONTROL_QUEUE))
        assert len(driver.commands.used()) == 1
        assert driver.mac == OTHER


def test_a_broken_queue_stops_at_once() -> None:
    with stopper() as driver:
        driver.start(buffers=0)
        driver.tx.make_available(driver.tx.size)  # no such descriptor
        driver.settle()
        assert driver.nic.card.queues[TX_QUEUE].fault
        driver.stop(TX_QUEUE)
        assert not driver.enabled(TX_QUEUE)


def test_a_queue_whose_rings_are_in_no_window_stops_at_once() -> None:
    with stopper() as driver:
        driver.start(buffers=0)
        driver.settle()
        with driver.function.gate:
            driver.function.dma.unmap_all()
        driver.stop(TX_QUEUE)
        assert not driver.enabled(TX_QUEUE)


# --- memory that the client must be asked for, and a stop at every moment of a burst


def ask_for_memory(driver: Stopper, client: Client) -> None:
    """Let the card reach its memory by message alone."""
    with driver.function.gate:
        driver.function.dma.unmap_all()
        map_by_message(driver.function.dma, client)


@contextmanager
def asking(buffers: int) -> Iterator[tuple[Stopper, Client]]:
    """A driver at work whose memory the card must ask for."""
    with stopper() as driver, client_of(driver.memory) as client:
        ask_for_memory(driver, client)
        driver.start(buffers=buffers)
        driver.settle()
        yield driver, client


class Interrupter:
    """Does `what` at the client's `moment`th ask, counted from the last `watch`."""

    def __init__(self, moment: int, what: Callable[[], None]) -> None:
        self.moment, self.what, self.asked = moment, what, 0

    def __call__(self, _ask: Ask) -> None:
        if self.asked == self.moment:
            self.what()
        self.asked += 1


@pytest.mark.parametrize("way", RESTORING)
@pytest.mark.parametrize("queue", [RX_QUEUE, TX_QUEUE])
def test_a_queue_that_is_stopped_at_any_moment_of_a_burst_stops_when_its_chains_are_done(
    queue: int, way: str
) -> None:
    moment, last = 0, False
    unsettled = 0
    while not last:
        with asking(buffers=6) as (driver, client):
            out = [numbered(n) for n in range(3)]
            into = [numbered(100 + n) for n in range(3)]
            early: list[tuple[bool, int]] = []

            def stop(driver: Stopper = driver, early: list[tuple[bool, int]] = early) -> None:
                driver.stop(queue)
                early.append((driver.enabled(queue), driver.state(queue)))

            for one in into:
                driver.cable.network.send(one)
            for one in out:
                driver.send(one)
            interrupter = client.meanwhile = Interrupter(moment, stop)
            driver.settle()
            last = not early
            if last:
                stop()
            for _ in range(10):
                driver.settle()
            assert not driver.enabled(queue)
            state = driver.state(queue)
            sent, received = driver.sent(), driver.received()
            ring = driver.tx if queue == TX_QUEUE else driver.rx
            done = len(sent) if queue == TX_QUEUE else len(received)
            driver.tx.used()
            assert state == done << 16 | done, "what the driver sees, and nothing more"
            assert ring.used_seen == done
            if early and early[0][0]:
                unsettled += 1
                assert early[0][1] & 0xFFFF <= done, "chains in flight are not done"
            driver.restore(queue, state, way)
            driver.settle()
            driver.settle()
            assert sent + driver.sent() == out
            assert received + driver.received() == into
            driver.tx.used()
            assert len(driver.tx.free) == driver.tx.size
            moment += 1
            assert interrupter.asked
    assert unsettled, "at some moment a chain was in flight"


def test_the_chain_in_flight_is_done_and_those_behind_it_are_left() -> None:
    with asking(buffers=0) as (driver, client):
        out = [numbered(n) for n in range(3)]
        seen: list[tuple[bool, int]] = []

        def stop_in_flight(ask: Ask) -> None:
            if ask[0] == "read" and ask[2] == HEADER + len(out[0]) and not seen:  # the first frame's bytes
                driver.stop(TX_QUEUE)
                seen.append((driver.enabled(TX_QUEUE), driver.state(TX_QUEUE)))

        client.meanwhile = stop_in_flight
        for one in out:
            driver.send(one)
        driver.settle()
        assert seen == [(True, 0)], "not before it is done"
        assert driver.sent() == out[:1]
        assert not driver.enabled(TX_QUEUE)
        assert driver.state(TX_QUEUE) == 0x0001_0001


def once_in_flight(driver: Stopper, client: Client, length: int, what: Callable[[], None]) -> None:
    """Do `what` when the client is asked for a frame of that length, whose chain is in flight then."""

    def meanwhile(ask: Ask) -> None:
        if ask[0] == "read" and ask[2] == HEADER + length:
            client.meanwhile = lambda ask: None
            what()

    client.meanwhile = meanwhile


def test_a_stop_is_called_off_by_enabling_the_queue_before_its_chain_in_flight_is_done() -> None:
    with asking(buffers=0) as (driver, client):
        out = [numbered(n) for n in range(3)]
        seen: list[bool] = []

        def stop_and_go_on() -> None:
            driver.stop(TX_QUEUE)
            driver.write(COMMON + ENABLE, 2, 1)
            seen.append(driver.enabled(TX_QUEUE))

        once_in_flight(driver, client, len(out[0]), stop_and_go_on)
        for one in out:
            driver.send(one)
        driver.settle()
        assert seen == [True]
        assert driver.sent() == out
        assert driver.enabled(TX_QUEUE)


@pytest.mark.parametrize("places", [False, True])
def test_a_driver_that_does_not_wait_for_the_end_of_a_stop_can_go_on_after_it(places: bool) -> None:
    """Linux's does not read queue_enable after it wrote 0."""
    with asking(buffers=0) as (driver, client):
        out = [numbered(n) for n in range(3)]
        once_in_flight(driver, client, len(out[0]), lambda: driver.stop(TX_QUEUE))
        for one in out:
            driver.send(one)
        driver.settle()
        assert driver.sent() == out[:1]
        if places:
            driver.function.region_write(LIVE_MIGRATION_BAR, RING_STATE[TX_QUEUE], b"\2\0")
        driver.write(COMMON + ENABLE, 2, 1)
        driver.settle()
        assert driver.enabled(TX_QUEUE)
        assert driver.sent() == out[2 if places else 1 :]


def test_a_stop_is_ended_by_reading_the_state_of_its_own_ring_alone() -> None:
    with asking(buffers=0) as (driver, client):
        seen: list[bool] = []

        def stop_and_look() -> None:
            driver.stop(TX_QUEUE)
            for offset in (0x08, RING_STATE[RX_QUEUE], RING_STATE[CONTROL_QUEUE], RING_STATE[TX_QUEUE] + 2):
                driver.function.region_read(LIVE_MIGRATION_BAR, offset, 2)
                seen.append(driver.enabled(TX_QUEUE))

        once_in_flight(driver, client, len(numbered(0)), stop_and_look)
        driver.send(numbered(0))
        driver.settle()
        assert seen == [True, True, True, False]


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("queue", [RX_QUEUE, TX_QUEUE])
def test_ring_state_that_is_read_at_any_moment_by_a_driver_that_does_not_wait_holds(
    queue: int, reset: bool
) -> None:
    """Linux's reads it by 16 bits, as soon as it has stopped the queue, and goes on from there."""
    moment, last = 0, False
    unsettled = 0
    while not last:
        with asking(buffers=6) as (driver, client):
            out = [numbered(n) for n in range(3)]
            into = [numbered(100 + n) for n in range(3)]
            base: list[int] = []

            def stop_and_read(driver: Stopper = driver, base: list[int] = base) -> None:
                driver.stop(queue)
                nonlocal unsettled
                unsettled += driver.nic.card.queues[queue].enabled
                raw = driver.function.region_read(LIVE_MIGRATION_BAR, RING_STATE[queue], 2)
                base.append(int.from_bytes(raw, "little"))

            for one in into:
                driver.cable.network.send(one)
            for one in out:
                driver.send(one)
            client.meanwhile = Interrupter(moment, stop_and_read)
            driver.settle()
            last = not base
            if last:
                stop_and_read()
            assert not driver.enabled(queue)
            driver.settle()
            states = [driver.state(number) for number in range(3)]
            assert states[queue] & 0xFFFF == base[0]
            sent, received = driver.sent(), driver.received()
            ring = driver.tx if queue == TX_QUEUE else driver.rx
            driver.tx.used()
            assert ring.used_seen == base[0], "what was read is what the driver sees, and goes on to see"
            if reset:
                driver.start_over(states, "last_avail alone")
            else:
                driver.write(COMMON + SELECT, 2, queue)
                driver.write(COMMON + ENABLE, 2, 1)
            driver.settle()
            again, more = driver.sent(), driver.received()
            driver.tx.used()
            assert len(driver.tx.free) == driver.tx.size
            if not reset:
                assert (sent + again, received + more) == (out, into), "each once"
            elif queue == TX_QUEUE:
                assert again == out[base[0] :], "those that the driver did not see go out again"
            else:
                assert received == into[: base[0]]
                assert more == into[len(into) - len(more) :], "those in the card's hands went with the reset"
            moment += 1
    assert unsettled, "at some moment a chain was in flight"


def test_a_look_at_a_queue_that_comes_to_rest_leaves_its_rings_where_a_burst_has_them() -> None:
    """What the burst waits for belongs into its copies, though the rings themselves are here by now."""
    with asking(buffers=1) as (driver, client):
        dma, memory = driver.function.dma, driver.memory
        index_at = driver.rx.driver + 2
        seen: list[bool] = []

        def look(ask: Ask) -> None:
            if ask[:2] == ("read", index_at):  # with a completion that the driver has not seen
                client.meanwhile = lambda ask: None
                driver.stop(RX_QUEUE)
                with driver.function.gate:
                    dma.unmap(memory.iova, memory.size)
                    dma.map(memory.iova, memory.size, 3, memory.fd)
                seen.append(driver.enabled(RX_QUEUE))
                client.answer = lambda data: b"\2\0"

        client.meanwhile = look
        for number in range(2):
            driver.cable.network.send(numbered(number))
        driver.settle()
        assert seen == [True]
        assert memory.read(index_at, 2) == b"\1\0", "that is the driver's to write"
        assert not driver.enabled(RX_QUEUE)


def test_a_stopped_queue_waits_with_its_card_and_moves_with_it() -> None:
    """The card is stopped before a chain that is in flight can be done; it is done where the card goes on."""
    with asking(buffers=0) as (driver, client):

        def stop_both(ask: Ask) -> None:
            if ask[0] == "write" and ask[1] == driver.tx.device + 4:  # the completion of the first frame
                driver.stop(TX_QUEUE)
                assert driver.enabled(TX_QUEUE)
                client.meanwhile = lambda ask: None
                driver.function.stop()

        client.meanwhile = stop_both
        driver.send(frame(b"once"))
        driver.nic.datapath.service()
        assert driver.sent() == [frame(b"once")]
        assert driver.enabled(TX_QUEUE), "its completion is not in the ring for good"
        driver.function.run()
        other = Stopper(Cable())
        ask_for_memory(other, client)
        driver.function.stop()
        move(driver.function, other.function)
        assert other.enabled(TX_QUEUE)
        other.settle()
        assert not other.enabled(TX_QUEUE)
        assert other.state(TX_QUEUE) == 0x0001_0001
        assert other.sent() == []
        assert len(driver.tx.used()) == 1
        other.nic.close()
        other.close()
