"""The function as a server drives it."""

import errno
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device._gate import Gate
from device.dma import PROT_DMA_READ, PROT_DMA_WRITE
from device.errors import DeviceError
from device.function import (
    Accesses,
    Bar,
    Identity,
    IoEventFdArea,
    IrqFlags,
    IrqKind,
    MemoryBar,
    PciFunction,
    Region,
    RegionIndex,
    ResetKind,
)
from device.pci.capabilities import Msi, Msix, PciExpress, PowerManagement
from tests.descriptors import open_fds, settled_fds
from tests.device.interrupts.listener import Listener, listeners

MIB = 1 << 20
COMMAND = 0x04
INTX_DISABLE = 1 << 10
BUS_MASTER = 1 << 2
MEMORY = 1 << 1
CONFIG = RegionIndex.CONFIG


@contextmanager
def no_descriptors() -> Iterator[None]:
    """No file can be opened within the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Counter:
    """A sub-range whose dword counts its reads and keeps its last write."""

    def __init__(self) -> None:
        self.reads = 0
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, count: int) -> int:
        self.reads += 1
        return self.reads

    def write(self, offset: int, count: int, value: int) -> None:
        self.written.append((offset, count, value))


class Rig:
    """A function with every kind of part, and four listeners."""

    def __init__(self, ears: list[Listener]) -> None:
        self.ears = ears
        self.counter = Counter()
        self.registers = Bar(0, 0x4000)
        self.registers.claim(0x100, 4, self.counter)
        self.memory = MemoryBar(2, MIB)
        self.express = PciExpress()
        self.function = PciFunction(
            "nic0",
            Identity(0x1AF4, 0x1041, 0x8086, 0x001A),
            bars=[self.registers, self.memory, Bar(4, 0x1000)],
            capabilities=[
                PowerManagement(),
                Msi(2),
                Msix(3, table_bar=0, table_offset=0x2000, pba_offset=0x3000),
                self.express,
            ],
        )

    def config(self, offset: int, count: int) -> int:
        return int.from_bytes(self.function.region_read(CONFIG, offset, count), "little")

    def configure(self, offset: int, count: int, value: int) -> None:
        self.function.region_write(CONFIG, offset, value.to_bytes(count, "little"))

    def wire_msix(self) -> None:
        self.function.irq_set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in self.ears[:3]])

    def wire_intx(self) -> None:
        self.function.irq_set_trigger(IrqKind.INTX, 0, [self.ears[0].fd])

    def heard(self) -> list[int]:
        return [ear.heard() for ear in self.ears]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with listeners(4) as ears:
        rig = Rig(ears)
        yield rig
        rig.function.close()


@pytest.fixture(scope="module")
def lasting() -> Iterator[Rig]:
    rig = Rig([])
    yield rig
    rig.function.close()


# --- regions


def test_regions_come_in_vfio_order(rig: Rig) -> None:
    absent = Region(0, readable=False, writable=False)
    assert rig.function.regions() == [
        Region(0x4000, readable=True, writable=True),
        absent,
        Region(MIB, readable=True, writable=True, fd=rig.memory.fd, mmap_areas=((0, MIB),)),
        absent,
        Region(0x1000, readable=True, writable=True),
        absent,
        absent,
        Region(4096, readable=True, writable=True),
        absent,
    ]


def test_region_accesses_reach_handlers_memory_and_configuration_space(rig: Rig) -> None:
    assert rig.function.region_read(0, 0x100, 4) == b"\x01\x00\x00\x00"
    rig.function.region_write(0, 0x102, memoryview(b"\x34\x12"))
    assert rig.counter.written == [(2, 2, 0x1234)]
    rig.function.region_write(2, 77, b"on the card")
    assert rig.function.region_read(2, 77, 11) == b"on the card"
    assert rig.function.region_read(CONFIG, 0, 4) == b"\xf4\x1a\x41\x10"


def test_a_large_read_is_bounded_by_the_region_alone(rig: Rig) -> None:
    assert len(rig.function.region_read(2, 0, MIB)) == MIB
    assert len(rig.function.region_read(0, 0, 0x4000)) == 0x4000
    assert len(rig.function.region_read(CONFIG, 0, 4096)) == 4096


@pytest.mark.parametrize("index", [1, 3, 5, 6, 8, 9, -1, 1 << 31])
def test_a_region_that_is_not_there_is_einval(rig: Rig, index: int) -> None:
    with pytest.raises(DeviceError) as refusal:
        rig.function.region_read(index, 0, 4)
    assert refusal.value.errno == errno.EINVAL
    with pytest.raises(DeviceError) as refusal:
        rig.function.region_write(index, 0, bytes(4))
    assert refusal.value.errno == errno.EINVAL


@given(
    st.sampled_from([0, 2, 4, 7]),
    st.integers(-8, 2 * MIB) | st.integers(0, (1 << 64) - 1),
    st.integers(0, 2 * MIB),
)
def test_an_access_is_inside_or_einval(lasting: Rig, index: int, offset: int, count: int) -> None:
    function = lasting.function
    size = function.regions()[index].size
    if offset >= 0 and offset + count <= size:
        assert len(function.region_read(index, offset, count)) == count
    else:
        with pytest.raises(DeviceError) as refusal:
            function.region_read(index, offset, count)
        assert refusal.value.errno == errno.EINVAL


# --- configuration space


def test_bus_mastering_is_told_to_the_card_when_it_changes(rig: Rig) -> None:
    told: list[bool] = []
    rig.function.on_bus_master = told.append
    seen = []
    for command in (MEMORY, MEMORY | BUS_MASTER, BUS_MASTER):
        rig.configure(COMMAND, 2, command)
        seen.append(rig.function.bus_master)
    rig.function.reset(ResetKind.DEVICE)
    seen.append(rig.function.bus_master)
    assert seen == [False, True, True, False]
    assert told == [True, False]


def test_memory_is_decoded_when_command_says_so_in_d0(rig: Rig) -> None:
    decoding = [rig.function.memory_enabled]
    rig.configure(COMMAND, 2, MEMORY)
    decoding.append(rig.function.memory_enabled)
    rig.configure(0x44, 2, 3)
    decoding.append(rig.function.memory_enabled)
    assert decoding == [False, True, False]


def test_the_status_bit_is_the_level_of_intx_even_when_disabled(rig: Rig) -> None:
    bit = 1 << 3
    levels = []
    for command in (0, INTX_DISABLE):
        rig.configure(COMMAND, 2, command)
        for level in (True, False):
            rig.function.interrupts.intx(level)
            levels.append(bool(rig.config(0x06, 2) & bit))
            assert bool(rig.config(0x04, 4) >> 16 & bit) == levels[-1]
    assert levels == [True, False, True, False]


def test_intx_disable_silences_the_line_and_clearing_it_lets_it_catch_up(rig: Rig) -> None:
    rig.wire_intx()
    rig.configure(COMMAND, 2, INTX_DISABLE)
    rig.function.interrupts.intx(True)
    assert rig.heard()[0] == 0
    rig.configure(COMMAND + 1, 1, 0)
    assert rig.heard()[0] == 1


# --- interrupts


def test_irqs_come_in_vfio_order(rig: Rig) -> None:
    assert [irq.count for irq in rig.function.irqs()] == [1, 2, 3, 1, 1]
    assert (
        rig.function.irqs()[IrqKind.INTX].flags == IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED
    )


def test_without_a_pin_there_is_no_intx() -> None:
    function = PciFunction("pinless", Identity(1, 2, 3, 4), interrupt_pin=0)
    assert function.irqs()[IrqKind.INTX].count == 0
    assert function.region_read(CONFIG, 0x3D, 1) == b"\0"


def test_the_way_of_a_linux_guest_under_qemu_from_intx_to_msix_and_back(rig: Rig) -> None:
    control = 0x60 + 2
    rig.wire_intx()
    rig.configure(control, 2, 0xC000)
    rig.function.irq_disable(IrqKind.INTX)
    rig.function.irq_set_trigger(IrqKind.MSIX, 0, [None])
    rig.function.irq_set_trigger(IrqKind.MSIX, 1, [rig.ears[1].fd])
    rig.function.interrupts.signal(1)
    assert rig.heard() == [0, 0, 0, 0], "the function mask is set"
    rig.configure(control, 2, 0x8000)
    assert rig.heard() == [0, 1, 0, 0]
    rig.configure(control, 2, 0x0000)
    rig.function.irq_disable(IrqKind.MSIX)
    rig.wire_intx()
    rig.function.interrupts.signal(1)
    assert rig.heard() == [1, 0, 0, 0]


def test_the_resample_eventfd_is_there_to_be_watched_while_intx_is_wired(rig: Rig) -> None:
    watched = [rig.function.unmask_fd]
    rig.wire_intx()
    rig.function.irq_set_unmask_fd(IrqKind.INTX, rig.ears[1].fd)
    watched.append(rig.function.unmask_fd)
    rig.function.interrupts.intx(True)
    rig.ears[1].say()
    assert os.eventfd_read(rig.ears[0].fd) == 1
    rig.function.unmask_fd_fired()
    assert rig.heard() == [1, 0, 0, 0]
    rig.function.irq_disable(IrqKind.INTX)
    watched.append(rig.function.unmask_fd)
    assert [fd is None for fd in watched] == [True, False, True]
    rig.function.unmask_fd_fired()


def test_the_client_is_asked_to_let_go_and_told_of_errors_if_it_listens(rig: Rig) -> None:
    assert not rig.function.request_release()
    assert not rig.function.report_error()
    rig.function.irq_set_trigger(IrqKind.REQ, 0, [rig.ears[0].fd])
    rig.function.irq_set_trigger(IrqKind.ERR, 0, [rig.ears[1].fd])
    assert rig.function.request_release()
    assert rig.function.report_error()
    assert rig.heard() == [1, 1, 0, 0]


# --- reset


def scramble(rig: Rig) -> None:
    rig.configure(0x10, 4, 0xFE000000)
    rig.configure(0x18, 8, 0xC_0000_0000)
    rig.configure(COMMAND, 2, MEMORY | BUS_MASTER | INTX_DISABLE)
    rig.configure(0x44, 2, 3)
    rig.configure(0x62, 2, 0xC000)
    rig.function.region_write(0, 0x2000, b"\x00\x00\xe0\xfe")
    rig.function.region_write(2, 0, b"secret")
    rig.function.interrupts.intx(True)


@pytest.mark.parametrize("kind", list(ResetKind))
def test_every_reset_brings_power_on_values(rig: Rig, kind: ResetKind) -> None:
    fresh = rig.function.region_read(CONFIG, 0, 4096)
    table = rig.function.region_read(0, 0x2000, 0x30)
    scramble(rig)
    rig.function.reset(kind)
    assert rig.function.region_read(CONFIG, 0, 4096) == fresh
    assert rig.function.region_read(0, 0x2000, 0x30) == table
    assert rig.function.region_read(2, 0, 6) == bytes(6)


@pytest.mark.parametrize("kind", list(ResetKind))
def test_the_card_hears_of_a_reset_before_anything_changes_and_inside_the_gate(
    rig: Rig, kind: ResetKind
) -> None:
    heard: list[tuple[ResetKind, bool, bool]] = []

    def look(kind: ResetKind) -> None:
        held = rig.function.gate.__exit__(None, None, None) is None
        rig.function.gate.__enter__()
        heard.append((kind, rig.function.bus_master, held))

    rig.function.on_reset = look
    scramble(rig)
    rig.function.reset(kind)
    assert heard == [(kind, True, True)]


@pytest.mark.parametrize("kind", [ResetKind.DEVICE, ResetKind.FLR])
def test_wired_vectors_go_on_working_after_a_reset(rig: Rig, kind: ResetKind) -> None:
    rig.wire_msix()
    rig.configure(0x62, 2, 0xC000)
    rig.function.interrupts.signal(0)
    rig.function.reset(kind)
    assert rig.heard() == [0, 0, 0, 0], "what was pending is forgotten"
    rig.function.interrupts.signal(2)
    assert rig.heard() == [0, 0, 1, 0]


@pytest.mark.parametrize("kind", [ResetKind.DEVICE, ResetKind.FLR])
def test_a_wired_line_goes_on_working_after_a_reset(rig: Rig, kind: ResetKind) -> None:
    rig.wire_intx()
    rig.function.irq_set_unmask_fd(IrqKind.INTX, rig.ears[1].fd)
    rig.function.interrupts.intx(True)
    assert rig.heard()[0] == 1
    rig.function.reset(kind)
    assert not rig.config(0x06, 2) & 1 << 3
    rig.function.interrupts.intx(True)
    assert rig.heard()[0] == 0, "the client has not unmasked what it heard before"
    rig.ears[1].say()
    rig.function.unmask_fd_fired()
    assert rig.heard()[0] == 1


def test_software_resets_through_the_express_capability(rig: Rig) -> None:
    kinds: list[ResetKind] = []
    rig.function.on_reset = kinds.append
    scramble(rig)
    rig.configure(rig.express.at("DEVICE_CONTROL"), 2, 1 << 15)
    assert kinds == [ResetKind.FLR]
    assert rig.config(0x10, 4) == 0


@pytest.mark.parametrize("kind", list(ResetKind))
def test_dma_windows_end_with_the_client_and_with_no_other_reset(rig: Rig, kind: ResetKind) -> None:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, mmap.PAGESIZE)
    rig.function.dma.map(0, mmap.PAGESIZE, PROT_DMA_READ | PROT_DMA_WRITE, fd)
    os.close(fd)
    rig.function.reset(kind)
    assert len(rig.function.dma) == (0 if kind is ResetKind.LOST_CLIENT else 1)


def test_a_lost_client_leaves_no_wiring(rig: Rig) -> None:
    rig.wire_msix()
    rig.function.irq_set_trigger(IrqKind.REQ, 0, [rig.ears[3].fd])
    rig.function.reset(ResetKind.LOST_CLIENT)
    assert rig.function.region_read(0, 0x200C, 4) == b"\x01\x00\x00\x00", "entries are masked again"
    rig.function.interrupts.signal(0)
    assert not rig.function.request_release()
    assert rig.heard() == [0, 0, 0, 0]
    rig.wire_intx()


@pytest.mark.parametrize("kind", list(ResetKind))
def test_the_log_of_written_pages_is_the_clients_and_ends_with_it(rig: Rig, kind: ResetKind) -> None:
    rig.function.dma.log_start(4096)
    rig.function.reset(kind)
    assert rig.function.dma.logging is (kind is not ResetKind.LOST_CLIENT)
    rig.function.reset(ResetKind.LOST_CLIENT)


def test_a_lost_clients_mappings_do_not_reach_the_next_clients_card(rig: Rig) -> None:
    with mmap.mmap(rig.memory.fd, MIB) as left_behind:
        rig.function.reset(ResetKind.LOST_CLIENT)
        left_behind[0:6] = b"attack"
        assert rig.function.region_read(2, 0, 6) == bytes(6)
    assert rig.function.regions()[2].fd == rig.memory.fd


def test_a_lost_client_is_forgotten_but_for_what_only_descriptors_can_replace(rig: Rig) -> None:
    """The reset is to be tried again, then."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, mmap.PAGESIZE)
    rig.function.dma.map(0, mmap.PAGESIZE, PROT_DMA_READ | PROT_DMA_WRITE, fd)
    os.close(fd)
    rig.function.region_write(2, 0, b"secret")
    rig.configure(COMMAND, 2, MEMORY | BUS_MASTER)
    rig.function.stop()
    taken = rig.memory.fd
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        rig.function.reset(ResetKind.LOST_CLIENT)
    assert rig.memory.fd == taken
    assert len(rig.function.dma) == 0
    assert not rig.function.bus_master
    assert rig.function.running
    rig.function.reset(ResetKind.LOST_CLIENT)
    assert rig.function.region_read(2, 0, 6) == bytes(6)


@pytest.mark.parametrize("kind", [ResetKind.DEVICE, ResetKind.FLR])
def test_a_clients_mapping_stays_the_cards_memory_through_other_resets(rig: Rig, kind: ResetKind) -> None:
    with mmap.mmap(rig.memory.fd, MIB) as mapping:
        mapping[0:6] = b"before"
        rig.function.reset(kind)
        assert mapping[0:6] == bytes(6)
        mapping[0:5] = b"after"
        assert rig.function.region_read(2, 0, 5) == b"after"


# --- stop and go on


def test_a_stopped_function_serves_registers_and_says_so_to_the_card(rig: Rig) -> None:
    happened: list[str] = []
    rig.function.on_stop = lambda: happened.append("stop")
    rig.function.on_run = lambda: happened.append("run")
    rig.function.stop()
    rig.function.stop()
    assert not rig.function.running
    assert rig.function.region_read(0, 0x100, 4) == b"\1\0\0\0"
    rig.configure(COMMAND, 2, BUS_MASTER)
    assert rig.function.bus_master
    rig.function.run()
    rig.function.run()
    assert rig.function.running
    assert happened == ["stop", "run"]


def test_what_interrupts_while_it_is_stopped_is_signalled_once_when_it_runs(rig: Rig) -> None:
    rig.wire_msix()
    rig.function.stop()
    for _ in range(2):
        rig.function.interrupts.signal(0)
    rig.function.on_run = lambda: rig.function.interrupts.signal(0)
    assert rig.heard() == [0, 0, 0, 0]
    rig.function.run()
    assert rig.heard() == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", list(ResetKind))
def test_resets_but_the_drivers_own_let_it_run_again(rig: Rig, kind: ResetKind) -> None:
    rig.function.stop()
    rig.function.reset(kind)
    assert rig.function.running is (kind is not ResetKind.FLR)
    rig.function.run()
    rig.wire_msix()
    rig.function.interrupts.signal(0)
    assert rig.heard() == [1, 0, 0, 0]


# --- what answers accesses


def test_what_comes_between_a_client_and_a_bar_answers_for_it(rig: Rig) -> None:
    seen: list[tuple[int, int]] = []

    def between(accesses: Accesses) -> Accesses:
        def read(offset: int, count: int) -> bytes:
            seen.append((offset, count))
            return accesses.read(offset, count)

        return Accesses(read, accesses.write)

    answer = rig.function.region_read(0, 0, 4)
    rig.function.interpose(0, between)
    assert rig.function.region_read(0, 0, 4) == answer
    rig.function.region_read(CONFIG, 0, 4)
    assert seen == [(0, 4)]
    with pytest.raises(KeyError):
        rig.function.interpose(1, between)


# --- eventfds for writes


def test_a_card_says_which_writes_eventfds_can_stand_for(rig: Rig) -> None:
    assert rig.function.io_eventfds(0) == ()
    area = IoEventFdArea(0x100, 2, rig.ears[0].fd)
    rig.function.doorbells = {0: (area,)}
    assert rig.function.io_eventfds(0) == (area,)
    assert rig.function.io_eventfds(CONFIG) == ()
    with pytest.raises(DeviceError) as refusal:
        rig.function.io_eventfds(1)
    assert refusal.value.errno == errno.EINVAL


# --- composition and end


def test_parts_share_the_functions_gate(rig: Rig) -> None:
    assert isinstance(rig.function.gate, Gate)
    assert rig.registers.gate is rig.function.gate


def test_parts_that_do_not_fit_are_refused() -> None:
    identity = Identity(1, 2, 3, 4)
    with pytest.raises(ValueError, match="bytes of 192"):
        PciFunction("f", identity, capabilities=[PciExpress() for _ in range(4)])
    with pytest.raises(ValueError, match="overlaps"):
        PciFunction("f", identity, bars=[Bar(0, 4096), Bar(0, 4096)])


def test_closing_gives_every_fd_back_and_may_be_repeated() -> None:
    with listeners(4) as ears:
        before = settled_fds()
        rig = Rig(ears)
        rig.wire_intx()
        rig.function.irq_set_unmask_fd(IrqKind.INTX, ears[1].fd)
        rig.function.irq_set_trigger(IrqKind.ERR, 0, [ears[2].fd])
        rig.function.close()
        rig.function.close()
        assert open_fds() == before
        with pytest.raises(DeviceError):
            rig.function.region_read(CONFIG, 0, 4)
