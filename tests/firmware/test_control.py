"""The control queue: commands as a driver writes them, and what becomes of those that make no sense."""

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device._gate import Gate
from device.dma import DmaWindows, PinCounters
from device.errors import DeviceError
from device.virtio._split import VirtQueue
from firmware._filter import ReceiveFilter
from firmware.control import MAX_COMMAND, MAX_REFUSALS_TOLD, ControlQueue
from tests.device.driver_side import DriverRing, GuestMemory
from tests.device.remote_side import Ask, Client, map_by_message

OWN = bytes.fromhex("525400000001")
OTHER = bytes.fromhex("525400000002")
GROUP = bytes.fromhex("01005e000001")
BROADCAST = b"\xff" * 6

OK, ERR = 0, 1
RX, MAC = 0, 1
TABLE_SET, ADDR_SET = 0, 1


class Control:
    """A control queue and its driver."""

    def __init__(self, *, size: int = 16, event_index: bool = False, by_message: bool = False) -> None:
        self.memory = GuestMemory(1 << 20)
        self.client = Client(self.memory)
        self.gate = Gate()
        self.dma = DmaWindows()
        self.dma.gate = self.gate
        if by_message:
            map_by_message(self.dma, self.client)
        else:
            self.memory.map_into(self.dma)
        self.ring = DriverRing(self.memory, size)
        self.queue = VirtQueue(self.dma, 2, 256)
        self.queue.enable(size, *self.ring.addresses, event_index=event_index, indirect=True)
        self.filter = ReceiveFilter(OWN)
        self.macs: list[bytes] = []
        self.announces = False  # whether it was asked to
        self.control = ControlQueue(self.queue, self.filter, self.macs.append, lambda: self.announces)

    def post(self, *parts: bytes, room: int = 1, indirect: bool = False) -> tuple[int, int]:
        """Make a command available; its head, and the address of its answer."""
        buffers = []
        for part in parts:
            address = self.memory.allocate(max(len(part), 1), 1)
            self.memory.write(address, part)
            buffers.append((address, len(part), False))
        answer = self.memory.allocate(max(room, 1))
        self.memory.write(answer, b"\xee")
        if room:
            buffers.append((answer, room, True))
        return (self.ring.add_indirect if indirect else self.ring.add)(buffers), answer

    def execute(self, *parts: bytes, room: int = 1, indirect: bool = False) -> int:
        """Execute a command; its answer."""
        head, answer = self.post(*parts, room=room, indirect=indirect)
        self.control.service()
        assert self.ring.used() == [(head, 1)]
        return self.memory.read(answer, 1)[0]

    def passes(self) -> list[bool]:
        return [self.filter.accept(mac) for mac in (OWN, OTHER, GROUP, BROADCAST)]

    def close(self) -> None:
        self.client.close()
        self.memory.close()


@pytest.fixture
def mapped() -> Iterator[Control]:
    made = Control()
    yield made
    made.close()


@pytest.fixture(params=[False, True], ids=["mapped", "by message"])
def control(request: pytest.FixtureRequest) -> Iterator[Control]:
    made = Control(by_message=request.param)
    yield made
    counters = made.dma.pins.counters
    assert counters.acquired == counters.released
    made.close()


def command(kind: int, number: int, data: bytes = b"") -> bytes:
    return bytes([kind, number]) + data


def table(*addresses: bytes) -> bytes:
    return struct.pack("<I", len(addresses)) + b"".join(addresses)


# --- commands


@pytest.mark.parametrize(
    ("number", "on"),
    [
        (0, [True, True, True, True]),
        (1, [True, False, True, True]),
        (2, [True, True, False, True]),
        (3, [True, False, False, True]),
        (4, [False, False, False, True]),
        (5, [True, False, False, False]),
    ],
    ids=["promiscuous", "all multicast", "all unicast", "no multicast", "no unicast", "no broadcast"],
)
def test_each_receive_mode_is_switched_on_and_off(control: Control, number: int, on: list[bool]) -> None:
    assert control.execute(command(RX, 0, b"\0")) == OK
    assert control.passes() == [True, False, False, True]
    assert control.execute(command(RX, number, b"\1")) == OK
    assert control.passes() == on
    assert control.execute(command(RX, number, b"\0")) == OK
    assert control.passes() == [True, False, False, True]


def test_any_value_but_zero_is_on(control: Control) -> None:
    control.execute(command(RX, 0, b"\0"))
    assert control.execute(command(RX, 2, b"\x80")) == OK
    assert control.filter.all_unicast


def test_the_cards_address_is_set(control: Control) -> None:
    assert control.execute(command(MAC, ADDR_SET, OTHER)) == OK
    assert control.macs == [OTHER]


def test_both_address_tables_are_set_and_emptied(control: Control) -> None:
    control.execute(command(RX, 0, b"\0"))
    assert control.execute(command(MAC, TABLE_SET), table(OTHER), table(GROUP)) == OK
    assert control.passes() == [True, True, True, True]
    assert control.execute(command(MAC, TABLE_SET), table(), table()) == OK
    assert control.passes() == [True, False, False, True]


def test_a_table_of_a_thousand_addresses_is_taken(control: Control) -> None:
    control.execute(command(RX, 0, b"\0"))
    many = [struct.pack("!HI", 0x0200, n) for n in range(1000)]
    assert control.execute(command(MAC, TABLE_SET), table(*many), table(*many)) == OK
    assert control.filter.accept(OTHER)


@pytest.mark.parametrize("cuts", [(1,), (1, 2), (2, 5), (6, 8, 14)])
def test_a_command_may_be_cut_anywhere(control: Control, cuts: tuple[int, ...]) -> None:
    control.execute(command(RX, 0, b"\0"))
    whole = command(MAC, TABLE_SET) + table(OTHER) + table(GROUP)
    parts = [whole[a:b] for a, b in zip((0, *cuts), (*cuts, len(whole)), strict=True)]
    assert control.execute(*parts) == OK
    assert control.passes() == [True, True, True, True]


def test_a_command_may_be_indirect(control: Control) -> None:
    assert control.execute(command(MAC, ADDR_SET), OTHER, indirect=True) == OK
    assert control.macs == [OTHER]


def test_an_answer_takes_one_byte_of_a_larger_room(control: Control) -> None:
    assert control.execute(command(RX, 0, b"\1"), room=16) == OK


def test_commands_that_wait_are_executed_in_their_order(control: Control) -> None:
    posted = [control.post(command(MAC, ADDR_SET, bytes([2, 0, 0, 0, 0, n]))) for n in range(5)]
    assert control.control.service()
    assert [mac[5] for mac in control.macs] == [0, 1, 2, 3, 4]
    assert control.ring.used() == [(head, 1) for head, _ in posted]


def test_an_announcement_is_acknowledged_when_it_was_asked_for(control: Control) -> None:
    control.announces = True
    assert control.execute(command(3, 0, b"\0")) == ERR
    assert control.execute(command(3, 0)) == OK


# --- refusals: the driver is told, and nothing else happens


REFUSED = {
    "nothing": b"",
    "a class without a command": b"\0",
    "a receive mode without its value": command(RX, 0),
    "a receive mode with two values": command(RX, 0, b"\1\1"),
    "an unknown receive mode": command(RX, 6, b"\1"),
    "an address that is too short": command(MAC, ADDR_SET, OTHER[:5]),
    "an address that is too long": command(MAC, ADDR_SET, OTHER + b"\0"),
    "an unknown command for addresses": command(MAC, 2, OTHER),
    "tables without lengths": command(MAC, TABLE_SET),
    "one table only": command(MAC, TABLE_SET, table(OTHER)),
    "half a length": command(MAC, TABLE_SET, table() + b"\0\0"),
    "a table longer than the command": command(MAC, TABLE_SET, struct.pack("<I", 2) + OTHER + table()),
    "a table of four billion": command(MAC, TABLE_SET, struct.pack("<I", 0xFFFFFFFF) + table()),
    "VLAN, which was not offered": command(2, 0, b"\1\0"),
    "an announcement that nobody asked for": command(3, 0),
    "an announcement with something more": command(3, 0, b"\0"),
    "an unknown command of announcements": command(3, 1),
    "queue pairs, which were not offered": command(4, 0, b"\1\0"),
    "offloads, which were not offered": command(5, 0, bytes(8)),
    "an unknown class": command(0xFF, 0, b"\1"),
    "a command that is too long": command(MAC, TABLE_SET, bytes(MAX_COMMAND)),
}


@pytest.mark.parametrize("request_", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_answered_with_an_error(control: Control, request_: bytes) -> None:
    control.execute(command(RX, 0, b"\0"))
    assert control.execute(*([request_] if request_ else [])) == ERR
    assert control.passes() == [True, False, False, True]
    assert control.macs == []
    assert control.execute(command(MAC, ADDR_SET, OTHER)) == OK


def test_a_second_table_that_is_wrong_leaves_the_first_one_alone(control: Control) -> None:
    control.execute(command(RX, 0, b"\0"))
    assert control.execute(command(MAC, TABLE_SET), table(OTHER), b"\1\0\0\0") == ERR
    assert not control.filter.accept(OTHER)


# --- malformed chains


def test_a_command_without_room_for_an_answer_breaks_off(control: Control) -> None:
    control.post(command(MAC, ADDR_SET, OTHER), room=0)
    with pytest.raises(DeviceError, match="without a byte for the answer"):
        control.control.service()


def test_commands_that_break_off_hold_no_memory(mapped: Control) -> None:
    mapped.post(b"\0", room=0)
    with pytest.raises(DeviceError):
        mapped.control.service()
    assert mapped.dma.pins.counters == PinCounters(1, 1)
    mapped.dma.unmap(mapped.memory.iova, mapped.memory.size)


def test_a_command_in_memory_that_is_about_to_go_waits_until_it_stays(mapped: Control) -> None:
    _, answer = mapped.post(bytes([RX, 0, 1]))
    with mapped.dma.pins.leaving(0, (1 << 64) - 1, list):
        assert not mapped.control.service()
        assert mapped.control.unfinished
        assert mapped.memory.read(answer, 1) == b"\xee"
    assert mapped.control.service()
    assert (mapped.control.unfinished, mapped.filter.promiscuous) == (False, True)
    assert mapped.memory.read(answer, 1) == bytes([OK])
    assert len(mapped.dma.pins) == 0


def test_a_broken_queue_is_told(control: Control) -> None:
    control.ring.make_available(999)
    with pytest.raises(DeviceError):
        control.control.service()
    assert control.queue.fault


@pytest.mark.parametrize("writable", [False, True], ids=["the command", "the answer"])
def test_memory_that_is_not_there_breaks_off(control: Control, writable: bool) -> None:
    good = control.memory.allocate(16)
    control.memory.write(good, command(RX, 0, b"\1"))
    nowhere = 1 << 40
    control.ring.add([(good if writable else nowhere, 3, False), (nowhere if writable else good, 1, True)])
    with pytest.raises(DeviceError):
        control.control.service()
    assert control.ring.used() == []


# --- interrupts and doorbells


def test_an_interrupt_is_wanted_when_something_was_done(control: Control) -> None:
    assert not control.control.service()
    control.post(command(RX, 0, b"\1"))
    assert control.control.service()


def test_a_driver_that_polls_wants_none(control: Control) -> None:
    control.ring.set_no_interrupt(True)
    control.post(command(RX, 0, b"\1"))
    assert not control.control.service()


def test_with_event_index_the_driver_names_the_answer_it_waits_for() -> None:
    control = Control(event_index=True)
    wanted = []
    for _ in range(4):
        control.ring.set_used_event(2)
        control.post(command(RX, 0, b"\1"))
        wanted.append(control.control.service())
    assert wanted == [True, False, True, False]  # the first one always, for there was none before it
    assert control.ring.avail_event == 4
    control.close()


def test_a_driver_that_adds_commands_without_end_gets_a_ringful_at_a_time() -> None:
    control = Control(size=4)

    def another(mac: bytes) -> None:
        control.ring.used()
        control.post(command(MAC, ADDR_SET, mac))
        control.macs.append(mac)

    control.control = ControlQueue(control.queue, control.filter, another, lambda: False)
    control.post(command(MAC, ADDR_SET, OTHER))
    control.control.service()
    assert len(control.macs) == 5
    assert control.control.unfinished
    control.control.service()
    assert len(control.macs) == 10
    control.close()


def test_a_full_ring_is_finished_at_once(control: Control) -> None:
    for _ in range(16 // 2):
        control.post(command(RX, 0, b"\1"))
    control.control.service()
    assert not control.control.unfinished
    assert len(control.ring.used()) == 8


def test_a_driver_cannot_fill_the_log(control: Control, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3 * MAX_REFUSALS_TOLD):
        control.execute(b"\xff\xff")
        control.memory._next = control.memory.iova + (1 << 16)
    assert len(caplog.records) == MAX_REFUSALS_TOLD + 1


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_whatever_bytes_come_there_is_an_answer(parts: list[bytes]) -> None:
    control = Control()
    try:
        assert control.execute(*(part for part in parts if part)) in (OK, ERR)
    finally:
        control.close()


# --- while the client is asked


@pytest.fixture
def remote() -> Iterator[Control]:
    made = Control(by_message=True)
    yield made
    made.close()


@pytest.mark.parametrize("number", range(9))
def test_a_command_that_was_disturbed_is_answered_once(remote: Control, number: int) -> None:
    """Whatever was being asked for: the command may be executed again, its answer comes once."""
    head, answer = remote.post(command(MAC, ADDR_SET, OTHER))
    count = iter(range(number + 1))

    def meanwhile(_: Ask) -> None:
        if next(count, None) == number:
            with remote.gate:
                remote.dma.disturb()

    remote.client.meanwhile = meanwhile
    with remote.gate:
        interrupt = remote.control.service()
        assert remote.control.unfinished
        assert remote.control.service() or interrupt
        assert not remote.control.unfinished
    assert remote.ring.used() == [(head, 1)]
    assert remote.memory.read(answer, 1)[0] == OK
    assert set(remote.macs) == {OTHER}


@pytest.mark.parametrize("number", range(9))
def test_after_a_driver_started_over_nothing_is_asked_for_its_last_command(
    remote: Control, number: int
) -> None:
    remote.post(command(MAC, ADDR_SET, OTHER))
    count = iter(range(number + 1))

    def meanwhile(_: Ask) -> None:
        if next(count, None) == number:
            with remote.gate:
                remote.queue.reset()

    remote.client.meanwhile = meanwhile
    with remote.gate:
        remote.control.service()
        remote.control.service()
    assert len(remote.client.asked) == number + 1
    assert remote.queue.last_avail == 0


def test_a_client_that_is_gone_is_not_the_drivers_fault(remote: Control) -> None:
    remote.post(command(MAC, ADDR_SET, OTHER))

    def leave(_: Ask) -> None:
        raise DeviceError(errno.ENOTCONN, "gone")

    remote.client.meanwhile = leave
    with remote.gate:
        remote.control.service()
        assert remote.control.unfinished
        remote.control.service()
        assert not remote.control.unfinished
    assert len(remote.client.asked) == 1


def test_a_client_that_refuses_breaks_the_queue(remote: Control) -> None:
    remote.post(command(MAC, ADDR_SET, OTHER))

    def refuse(_: Ask) -> None:
        raise DeviceError(errno.EIO, "no")

    remote.client.meanwhile = refuse
    with pytest.raises(DeviceError, match="broken"), remote.gate:
        remote.control.service()
