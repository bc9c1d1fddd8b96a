"""Memory decoding on and off: who reaches a function's BARs meanwhile."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from device.dma import PROT_DMA_READ, PROT_DMA_WRITE, DmaWindows
from device.errors import DeviceError
from device.function import (
    Bar,
    Identity,
    IrqKind,
    MemoryBar,
    PciFunction,
    RegionIndex,
    ResetKind,
    Revocation,
)
from device.migration.migration import Migration
from device.migration.states import DeviceState
from device.pci.capabilities import Msix, PciExpress, PowerManagement, VirtioPciCfgAccess
from tests.device.interrupts.listener import listeners
from tests.device.migration.moves import everything, load, migration_of, move, saved
from tests.device.pci.mapped import Mapping, mapped

SIZE = 1 << 20
PAGE = mmap.PAGESIZE
COMMAND, POWER = 0x04, 0x44
MEMORY, BUS_MASTER = 1 << 1, 1 << 2
D0, D3_HOT = 0, 3
CONFIG = RegionIndex.CONFIG
TABLE = 0x2000
TOGGLES = 1000

ENFORCED, COOPERATIVE = Revocation.ENFORCED, Revocation.COOPERATIVE


class Card:
    """A function with registers in BAR 0 and memory in BARs 2 and 4."""

    def __init__(self, revocation: Revocation, *, command_memory: bool = True) -> None:
        self.memory = MemoryBar(2, SIZE, revocation=revocation)
        self.express = PciExpress()
        self.window = VirtioPciCfgAccess()
        self.function = PciFunction(
            "card",
            Identity(0x1AF4, 0x1041, 0x8086, 0x001A),
            bars=[Bar(0, 0x4000), self.memory, MemoryBar(4, PAGE, revocation=revocation)],
            capabilities=[
                PowerManagement(),
                Msix(3, table_bar=0, table_offset=TABLE, pba_offset=0x3000),
                self.express,
                self.window,
            ],
            command_memory=command_memory,
        )
        self.function.migration = Migration(self.function)

    def configure(self, offset: int, count: int, value: int) -> None:
        self.function.region_write(CONFIG, offset, value.to_bytes(count, "little"))

    def command(self, value: int) -> None:
        self.configure(COMMAND, 2, value)

    def power(self, state: int) -> None:
        self.configure(POWER, 2, state)

    def software_resets(self) -> None:
        """A function level reset, as the guest's driver asks for it."""
        self.configure(self.express.at("DEVICE_CONTROL"), 2, 1 << 15)

    def answers(self) -> list[int]:
        """The errno with which each BAR, and configuration space, refuses to be read; 0: it answers."""
        return [refusal(partial(self.function.region_read, index, 0, 4)) for index in (0, 2, 4, CONFIG)]


def refusal(access: Callable[[], object]) -> int:
    try:
        access()
    except DeviceError as error:
        return error.errno or -1
    return 0


@contextmanager
def card(revocation: Revocation, *, command_memory: bool = True) -> Iterator[Card]:
    made = Card(revocation, command_memory=command_memory)
    try:
        yield made
    finally:
        made.function.close()


@pytest.fixture
def enforced() -> Iterator[Card]:
    with card(ENFORCED) as made:
        yield made


@pytest.fixture
def client(enforced: Card) -> Iterator[Mapping]:
    """A mapping of BAR 2, whose memory is decoded now."""
    enforced.command(MEMORY)
    with mapped(enforced.memory.fd, SIZE) as mapping:
        yield mapping


NOT_ANSWERED = [errno.EIO, errno.EIO, errno.EIO, 0]
ANSWERED = [0, 0, 0, 0]


# --- by message


def test_at_power_on_and_after_a_disable_every_bar_answers_eio_by_message(enforced: Card) -> None:
    assert enforced.answers() == NOT_ANSWERED
    enforced.command(MEMORY)
    assert enforced.answers() == ANSWERED
    enforced.command(BUS_MASTER)
    assert enforced.answers() == NOT_ANSWERED
    assert refusal(lambda: enforced.function.region_write(0, 0, bytes(4))) == errno.EIO
    assert refusal(lambda: enforced.function.region_write(2, 0, bytes(4))) == errno.EIO


def test_outside_of_a_bar_it_is_einval_as_ever(enforced: Card) -> None:
    for index, offset in ((0, 0x4000), (2, SIZE - 2), (2, -1), (4, PAGE), (3, 0), (9, 0)):
        assert refusal(partial(enforced.function.region_read, index, offset, 4)) == errno.EINVAL


def test_a_write_that_was_refused_was_not_done(enforced: Card, client: Mapping) -> None:
    enforced.command(0)
    assert refusal(lambda: enforced.function.region_write(2, 0, b"x")) == errno.EIO
    enforced.command(MEMORY)
    assert client.load(0) == b"\0"


def test_a_cooperative_function_answers_whatever_is_decoded() -> None:
    with card(COOPERATIVE) as made:
        made.command(MEMORY)
        with mapped(made.memory.fd, SIZE) as client:
            for change in (partial(made.command, 0), partial(made.power, D3_HOT)):
                change()
                client.store(0, b"x")
                assert made.answers() == ANSWERED
                assert made.function.region_read(2, 0, 1) == b"x"


def test_a_function_without_memory_takes_nothing_back() -> None:
    function = PciFunction("plain", Identity(1, 2, 3, 4), bars=[Bar(0, 0x1000)])
    assert function.region_read(0, 0, 1) == b"\0"
    function.close()


def test_memory_bars_of_one_function_have_one_way_of_revocation() -> None:
    bars = [MemoryBar(0, PAGE), MemoryBar(2, PAGE, revocation=ENFORCED)]
    with pytest.raises(ValueError, match="one way"):
        PciFunction("mixed", Identity(1, 2, 3, 4), bars=bars)
    for bar in bars:
        bar.close()


def test_vectors_are_wired_and_configured_while_their_table_does_not_answer(enforced: Card) -> None:
    with listeners(3) as ears:
        enforced.function.irq_set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in ears])
        assert refusal(lambda: enforced.function.region_read(0, TABLE, 4)) == errno.EIO
        enforced.configure(0x4A, 2, 0x8000)
        enforced.function.interrupts.signal(1)
        assert [ear.heard() for ear in ears] == [0, 1, 0]


def test_the_window_in_configuration_space_needs_no_decoding(enforced: Card, client: Mapping) -> None:
    client.store(16, b"abcd")
    enforced.command(0)
    for register, value in (("BAR", 2), ("OFFSET", 16), ("LENGTH", 4)):
        enforced.configure(enforced.window.at(register), 1, value)
    assert enforced.function.region_read(CONFIG, enforced.window.at("DATA"), 4) == b"abcd"


# --- by mapping


def test_a_fresh_client_is_told_of_the_mapping_before_there_is_anything_in_it(enforced: Card) -> None:
    region = enforced.function.regions()[2]
    assert (region.size, region.mmap_areas) == (SIZE, ((0, SIZE),))
    assert region.fd is not None
    assert os.fstat(region.fd).st_size == 0


def test_toggling_command_memory_keeps_every_byte(enforced: Card, client: Mapping) -> None:
    client.store(3 * PAGE, b"kept")
    enforced.command(BUS_MASTER)
    assert client.load(3 * PAGE) is None
    enforced.command(MEMORY)
    assert client.load(3 * PAGE, 4) == b"kept"


def test_d3hot_takes_mappings_away_and_d0_gives_them_back(enforced: Card, client: Mapping) -> None:
    client.store(0, b"x")
    enforced.power(D3_HOT)
    assert (client.load(0), enforced.answers()) == (None, NOT_ANSWERED)
    enforced.command(MEMORY | BUS_MASTER)
    assert client.load(0) is None
    enforced.power(D0)
    assert (client.load(0), enforced.answers()) == (b"x", ANSWERED)


def test_a_power_state_that_there_is_not_changes_nothing(enforced: Card, client: Mapping) -> None:
    enforced.power(1)
    assert client.load(0) == b"\0"


def test_a_write_across_both_registers_counts_as_one(enforced: Card, client: Mapping) -> None:
    client.store(0, b"x")
    space = bytearray(enforced.function.region_read(CONFIG, 0, 0x48))
    space[POWER] = D3_HOT
    enforced.function.region_write(CONFIG, 0, space)
    assert client.load(0) is None
    space[POWER] = D0
    enforced.function.region_write(CONFIG, 0, space)
    assert client.load(0) == b"x"


@pytest.mark.parametrize("kind", [*ResetKind, None], ids=lambda kind: kind.name if kind else "by software")
def test_every_reset_takes_mappings_away_and_leaves_zeros(
    enforced: Card, client: Mapping, kind: ResetKind | None
) -> None:
    client.store(PAGE, b"secret")
    if kind is None:
        enforced.software_resets()
    else:
        enforced.function.reset(kind)
    assert (client.load(PAGE), enforced.answers()) == (None, NOT_ANSWERED)
    enforced.command(MEMORY)
    assert enforced.function.region_read(2, PAGE, 6) == bytes(6)
    assert client.load(PAGE) == (None if kind is ResetKind.LOST_CLIENT else b"\0")


def test_one_bar_that_fails_leaves_no_other_one_mapped(
    enforced: Card, client: Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    enforced.function.region_write(4, 0, b"x")

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    client.store(0, b"x")
    with mapped(enforced.function.bars[4].fd or 0, PAGE) as other, monkeypatch.context() as short:
        short.setattr(os, "pwrite", full)
        assert refusal(lambda: enforced.command(0)) == errno.EIO
        assert (client.load(0), other.load(0)) == (None, None)
        assert enforced.answers() == NOT_ANSWERED


# --- virtual functions


def test_a_virtual_function_ignores_command_memory() -> None:
    with card(ENFORCED, command_memory=False) as made, mapped(made.memory.fd, SIZE) as client:
        assert made.answers() == ANSWERED
        client.store(0, b"x")
        for command in (MEMORY, 0):
            made.command(command)
            assert (client.load(0), made.function.memory_enabled) == (b"x", True)


def test_a_virtual_function_in_d3hot_does_not_answer() -> None:
    with card(ENFORCED, command_memory=False) as made, mapped(made.memory.fd, SIZE) as client:
        client.store(0, b"x")
        made.power(D3_HOT)
        assert (client.load(0), made.answers()) == (None, NOT_ANSWERED)
        made.power(D0)
        assert (client.load(0), made.answers()) == (b"x", ANSWERED)


@pytest.mark.parametrize("kind", ResetKind)
def test_a_virtual_function_answers_after_a_reset_with_zeros(kind: ResetKind) -> None:
    with card(ENFORCED, command_memory=False) as made, mapped(made.memory.fd, SIZE) as client:
        client.store(0, b"x")
        made.power(D3_HOT)
        made.function.reset(kind)
        assert made.answers() == ANSWERED
        assert made.function.region_read(2, 0, 1) == b"\0"
        assert client.load(0) == (None if kind is ResetKind.LOST_CLIENT else b"\0")


# --- poison


def test_poison_is_eio_by_message_gone_from_mappings_and_reported(enforced: Card, client: Mapping) -> None:
    client.store(2 * PAGE, b"behind")
    with listeners(1) as (ear,):
        enforced.function.irq_set_trigger(IrqKind.ERR, 0, [ear.fd])
        assert enforced.function.poison(2, PAGE + 5)
        assert ear.heard() == 1
    assert refusal(lambda: enforced.function.region_read(2, PAGE, 1)) == errno.EIO
    assert refusal(lambda: enforced.function.region_write(2, PAGE, b"x")) == errno.EIO
    assert [client.load(page * PAGE) for page in range(3)] == [b"\0", None, None]
    assert enforced.function.region_read(2, 2 * PAGE, 6) == b"behind"


@pytest.mark.parametrize("kind", ResetKind)
def test_no_reset_heals_poison_and_a_repair_does(enforced: Card, client: Mapping, kind: ResetKind) -> None:
    assert not enforced.function.poison(2, PAGE)  # nobody listens
    enforced.function.reset(kind)
    enforced.command(MEMORY)
    assert refusal(lambda: enforced.function.region_read(2, PAGE, 1)) == errno.EIO
    enforced.memory.repair()
    assert enforced.function.region_read(2, PAGE, 1) == b"\0"
    assert os.fstat(enforced.memory.fd).st_size == SIZE


def test_sealed_memory_and_registers_cannot_be_poisoned() -> None:
    with card(COOPERATIVE) as made, listeners(1) as (ear,):
        made.function.irq_set_trigger(IrqKind.ERR, 0, [ear.fd])
        assert refusal(lambda: made.function.poison(2, 0)) == errno.EOPNOTSUPP
        assert refusal(lambda: made.function.poison(0, 0)) == errno.EINVAL
        assert ear.heard() == 0


@pytest.mark.parametrize("gone", ["poison", "decoding", "reset"])
@pytest.mark.parametrize("write_first", [False, True])
def test_dma_of_a_peer_to_a_page_that_is_gone_fails(
    enforced: Card, client: Mapping, gone: str, write_first: bool
) -> None:
    client.store(PAGE, b"secret")
    peer = DmaWindows()
    peer.map(0, SIZE, PROT_DMA_READ | PROT_DMA_WRITE, enforced.memory.fd)
    assert peer.read(PAGE, 6) == b"secret"
    if gone == "poison":
        enforced.function.poison(2, PAGE)
    elif gone == "decoding":
        enforced.command(0)
    else:
        enforced.function.reset(ResetKind.DEVICE)
    accesses: list[Callable[[], object]] = [partial(peer.read, PAGE, 6), partial(peer.write, PAGE, b"x")]
    if write_first:
        accesses.reverse()
    assert [refusal(access) for access in accesses] == [errno.EFAULT, errno.EFAULT]
    assert peer.lost_backings() == 1
    enforced.memory.repair()
    enforced.command(MEMORY)
    assert refusal(partial(peer.read, PAGE, 6)) == errno.EFAULT
    peer.unmap_all()
    peer.map(0, SIZE, PROT_DMA_READ | PROT_DMA_WRITE, enforced.memory.fd)
    assert peer.read(PAGE, 6) == (b"secret" if gone == "decoding" else bytes(6))
    peer.unmap_all()


# --- migration


@pytest.mark.parametrize("source_way", Revocation)
@pytest.mark.parametrize("target_way", Revocation)
def test_a_card_that_arrives_with_memory_enabled_has_it_mapped(
    source_way: Revocation, target_way: Revocation
) -> None:
    with card(source_way) as source, card(target_way) as target:
        source.command(MEMORY)
        source.function.region_write(2, PAGE, b"moved")
        move(source.function, target.function)
        with mapped(target.memory.fd, SIZE) as client:
            assert client.load(PAGE, 5) == b"moved"
        assert target.answers() == ANSWERED


def test_a_card_that_is_saved_while_its_memory_is_off_brings_what_it_had(
    enforced: Card, client: Mapping
) -> None:
    client.store(PAGE, b"moved")
    enforced.command(0)
    with card(ENFORCED) as target:
        move(enforced.function, target.function)
        assert target.answers() == NOT_ANSWERED
        assert os.fstat(target.memory.fd).st_size == 0
        target.command(MEMORY)
        assert target.function.region_read(2, PAGE, 5) == b"moved"


def test_memory_that_is_switched_between_the_passes_of_a_migration_arrives(
    enforced: Card, client: Mapping
) -> None:
    client.store(PAGE, b"first")
    migration_of(enforced.function).set_state(DeviceState.PRE_COPY)
    stream = everything(migration_of(enforced.function))
    enforced.command(0)
    stream += everything(migration_of(enforced.function))
    enforced.command(MEMORY)
    client.store(2 * PAGE, b"later")
    enforced.command(0)
    with card(ENFORCED) as target:
        load(target.function, stream + saved(enforced.function, ahead=False))
        target.command(MEMORY)
        assert target.function.region_read(2, PAGE, 5) == b"first"
        assert target.function.region_read(2, 2 * PAGE, 5) == b"later"


def test_what_a_target_had_mapped_is_the_arriving_cards_memory(enforced: Card, client: Mapping) -> None:
    client.store(0, b"old")
    with card(ENFORCED) as source:
        source.command(MEMORY)
        source.function.region_write(2, PAGE, b"new")
        move(source.function, enforced.function)
    assert (client.load(0, 3), client.load(PAGE, 3)) == (bytes(3), b"new")


def test_a_client_that_cuts_the_file_saves_and_loads_all_the_same(enforced: Card, client: Mapping) -> None:
    client.store(0, b"x")
    client.store(PAGE, b"x")
    os.ftruncate(enforced.memory.fd, PAGE)
    with card(ENFORCED) as target:
        target.command(MEMORY)
        os.ftruncate(target.memory.fd, 0)
        move(enforced.function, target.function)
        assert target.function.region_read(2, 0, PAGE) == b"x" + bytes(PAGE - 1)


def test_a_card_with_less_memory_behind_a_bar_is_another_one() -> None:
    bars = [MemoryBar(2, SIZE), MemoryBar(2, SIZE, backing=SIZE // 2)]
    functions = [PciFunction("card", Identity(1, 2, 3, 4), bars=[bar]) for bar in bars]
    for function in functions:
        function.migration = Migration(function)
    with pytest.raises(DeviceError, match="memory of 0x80000"):
        move(*functions)
    for function in functions:
        function.close()


def test_a_poisoned_card_becomes_no_other_one(enforced: Card, client: Mapping) -> None:
    """Nothing of the state that came is in it then."""
    enforced.function.region_write(2, 0, b"own")
    enforced.function.poison(2, 5 * PAGE)
    with card(COOPERATIVE) as source:
        source.command(MEMORY | BUS_MASTER)
        source.function.region_write(2, 5 * PAGE, b"moved")
        stream = saved(source.function)
    assert refusal(partial(load, enforced.function, stream)) == errno.EIO
    assert migration_of(enforced.function).state is DeviceState.ERROR
    assert enforced.function.region_read(2, 0, 3) == b"own"
    assert enforced.function.region_read(CONFIG, COMMAND, 2) == MEMORY.to_bytes(2, "little")
    enforced.memory.repair()
    enforced.function.reset(ResetKind.DEVICE)
    load(enforced.function, stream)
    assert enforced.function.region_read(2, 5 * PAGE, 5) == b"moved"


@pytest.mark.parametrize("ahead", [True, False])
def test_a_poisoned_card_is_not_saved(enforced: Card, client: Mapping, ahead: bool) -> None:
    migration = migration_of(enforced.function)
    enforced.function.region_write(2, 0, b"x")
    enforced.function.poison(2, 5 * PAGE)
    migration.set_state(DeviceState.PRE_COPY if ahead else DeviceState.STOP_COPY)
    for _ in range(3):
        with pytest.raises(DeviceError) as refused:
            everything(migration)
        assert refused.value.errno == errno.EIO


# --- for long

PLACES = (0, SIZE // 2, SIZE - PAGE)

TOUCH = """
from tests.device.pci.mapped import Mapping
client, faults, seen = Mapping({fd}, {size}), 0, dict.fromkeys({places}, 0)
print(flush=True)
while min(seen.values()) < {last}:
    for place in seen:
        found = client.load(place, 8)
        if found is None:
            faults += 1
        else:
            number = int.from_bytes(found, "little")
            assert number >= seen[place], (place, number, seen)
            seen[place] = number
        client.store(place + 8, b"noise")
print(faults)
"""


def test_a_thousand_toggles_under_a_process_that_touches_show_it_no_stale_byte(enforced: Card) -> None:
    fd = enforced.memory.fd
    enforced.command(MEMORY)
    with subprocess.Popen(
        [sys.executable, "-c", TOUCH.format(fd=fd, size=SIZE, places=PLACES, last=TOGGLES)],
        stdout=subprocess.PIPE,
        pass_fds=[fd],
        cwd=Path(__file__).parents[2],
    ) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            for toggle in range(1, TOGGLES + 1):
                for place in PLACES:
                    enforced.function.region_write(2, place, toggle.to_bytes(8, "little"))
                enforced.command(0)
                enforced.command(MEMORY)
            assert int(child.stdout.readline()) > 0
            assert child.wait() == 0
        finally:
            child.kill()
