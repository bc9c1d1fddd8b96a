from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.irqchip import IrqchipError
from client.irqchip.registers import RedirectionEntry
from client.irqchip.userspace import Delivery, Ioapic, open_ioapic
from tests.client.irqchip.userspace.test_chip import active, devices, serve

REGSEL, WIN = 0x00, 0x10
EOI = 0xB0
OPEN = RedirectionEntry(vector=0x50, level=True, masked=False)


def programmed() -> Ioapic:
    chip = Ioapic()
    chip.program()
    chip.activate()
    return chip


def register(chip: Ioapic, number: int) -> int:
    chip.write(REGSEL, number)
    assert chip.read(REGSEL) == number
    return chip.read(WIN)


def test_it_is_programmed_with_a_vector_for_each_input_by_level_and_active_low() -> None:
    state = programmed().state()
    assert [entry.vector for entry in state.entries] == list(range(0x30, 0x48))
    assert all(entry.level and entry.active_low and not entry.masked for entry in state.entries)
    assert state.local.enabled


def test_after_power_on_all_inputs_are_masked_and_the_local_apic_is_off() -> None:
    chip = Ioapic()
    chip.activate()
    assert chip.state().entries == (RedirectionEntry(),) * 24
    chip.redirect(5, OPEN)
    chip.set_level(5, True)
    assert not chip.asks
    assert not chip.state().entries[5].remote_irr


def test_its_identification_can_be_read_and_the_version_not_be_written() -> None:
    chip = programmed()
    chip.write(REGSEL, 0)
    chip.write(WIN, 0xFF00_0000)
    assert register(chip, 0) == register(chip, 2) == 0x0F00_0000
    chip.write(REGSEL, 1)
    chip.write(WIN, 0)
    assert register(chip, 1) == 23 << 16 | 0x11
    assert chip.state().id == 0xF


def test_entries_are_read_as_they_were_written_and_nothing_is_beyond_them() -> None:
    chip = programmed()
    entry = RedirectionEntry(vector=0x99, delivery_mode=1, logical=True, masked=True, destination=0x5A)
    chip.redirect(23, entry)
    assert register(chip, 0x3E) == entry.pack() & 0xFFFF_FFFF
    assert register(chip, 0x3F) == 0x5A00_0000
    for beyond in (0x03, 0x0F, 0x40, 0xFF):
        chip.write(REGSEL, beyond)
        chip.write(WIN, 0)
        assert register(chip, beyond) == 0xFFFF_FFFF
    assert chip.state().entries[23] == entry
    chip.write(0x20, 5)
    assert chip.read(0x20) == 0


@pytest.mark.parametrize("offset", [-1, 0x100])
def test_there_is_nothing_beyond_its_window(offset: int) -> None:
    chip = programmed()
    for access in (lambda: chip.read(offset), lambda: chip.write(offset, 0)):
        with pytest.raises(IrqchipError) as error:
            access()
        assert error.value.errno == errno.ENXIO


def test_a_level_is_delivered_again_until_it_falls() -> None:
    chip = programmed()
    chip.set_level(20, True)
    delivery = chip.acknowledge()
    assert delivery == Delivery(20, 0x44)
    assert chip.state().entries[20].remote_irr
    assert not chip.asks
    chip.end(delivery)
    assert chip.asks
    chip.set_level(20, False)
    assert chip.asks, "the local APIC has it already"
    assert serve(chip) == 20
    assert not chip.asks
    assert not chip.state().entries[20].remote_irr


def test_an_edge_is_delivered_once() -> None:
    chip = programmed()
    chip.redirect(5, replace(OPEN, level=False))
    chip.set_level(5, True)
    assert chip.state().irr == 0, "it was delivered"
    assert serve(chip) == 5
    assert not chip.asks
    chip.set_level(5, True)
    assert not chip.asks
    assert chip.state().irr == 1 << 5, "KVM says so of an edge that came to nothing"
    chip.set_level(5, False)
    chip.set_level(5, True)
    assert serve(chip) == 5


def test_remote_irr_cannot_be_written_and_goes_when_the_entry_becomes_an_edge() -> None:
    chip = programmed()
    chip.set_level(5, True)
    delivery = chip.acknowledge()
    chip.redirect(5, replace(OPEN, vector=0x35))
    assert chip.state().entries[5].remote_irr
    chip.redirect(5, replace(OPEN, vector=0x35, level=False))
    assert not chip.state().entries[5].remote_irr
    chip.redirect(6, replace(OPEN, remote_irr=True))
    assert not chip.state().entries[6].remote_irr
    assert delivery is not None


@pytest.mark.parametrize(
    "entry",
    [
        replace(OPEN, masked=True),
        replace(OPEN, destination=1),
        replace(OPEN, destination=2, logical=True),
        replace(OPEN, delivery_mode=4),
    ],
    ids=["masked", "another APIC", "another logical APIC", "NMI"],
)
def test_what_is_not_for_this_cpu_or_no_interrupt_does_not_reach_it(entry: RedirectionEntry) -> None:
    chip = programmed()
    chip.redirect(5, entry)
    chip.set_level(5, True)
    assert not chip.asks
    assert not chip.state().entries[5].remote_irr
    assert chip.state().irr == 1 << 5
    chip.redirect(5, OPEN)
    assert serve(chip) == 5


@pytest.mark.parametrize(
    "entry",
    [
        replace(OPEN, destination=0xFF),
        replace(OPEN, destination=1, logical=True),
        replace(OPEN, destination=0xFF, logical=True),
        replace(OPEN, delivery_mode=1),
        replace(OPEN, active_low=True),
    ],
    ids=["broadcast", "logical", "logical broadcast", "lowest priority", "active low"],
)
def test_what_is_for_this_cpu_reaches_it(entry: RedirectionEntry) -> None:
    chip = programmed()
    chip.redirect(5, entry)
    chip.set_level(5, True)
    assert serve(chip) == 5


def test_inputs_that_share_a_vector_are_acknowledged_and_ended_together() -> None:
    chip = programmed()
    for gsi in (5, 6):
        chip.redirect(gsi, OPEN)
        chip.set_level(gsi, True)
    delivery = chip.acknowledge()
    assert delivery == Delivery(5, 0x50)
    chip.set_level(5, False)
    chip.set_level(6, False)
    chip.end(delivery)
    assert not chip.asks
    assert [chip.counters[gsi].acknowledged for gsi in (5, 6)] == [1, 1]
    assert [chip.counters[gsi].ended for gsi in (5, 6)] == [1, 1]
    assert not any(entry.remote_irr for entry in chip.state().entries)


def test_an_older_interrupt_can_be_ended_before_a_newer_one() -> None:
    chip = programmed()
    chip.set_level(5, True)
    low = chip.acknowledge()
    chip.set_level(23, True)
    high = chip.acknowledge()
    assert low is not None
    assert high is not None
    chip.set_level(5, False)
    chip.set_level(23, False)
    chip.end(low)
    assert chip.state().local.isr == 1 << high.vector
    chip.end(high)
    assert chip.state().local.isr == 0


def test_a_guest_ends_what_has_the_highest_priority_by_the_local_apics_register() -> None:
    chip = programmed()
    for gsi in (5, 23):
        chip.set_level(gsi, True)
        assert chip.acknowledge()
        chip.set_level(gsi, False)
    chip.local.write(EOI, 0)
    assert chip.state().local.isr == 1 << 0x35
    chip.local.write(EOI, 0)
    chip.local.write(EOI, 0)
    assert chip.state().local.isr == 0


async def test_what_waits_while_masked_is_asked_for_again_when_it_is_unmasked() -> None:
    with devices() as (device,):
        async with active(open_ioapic) as chip:
            chip.redirect(10, replace(OPEN, masked=True))
            device.attach(chip)
            await device.fire()
            assert chip.state().irr == 1 << 10
            chip.redirect(10, OPEN)
            assert device.resampled == 1
            assert not chip.asks
            assert chip.counters[10].resampled == 1
            await device.fire()
            assert serve(chip) == 10


async def test_what_waits_while_masked_is_delivered_if_somebody_else_drives_it_too() -> None:
    with devices() as (device,):
        async with active(open_ioapic) as chip:
            chip.redirect(10, replace(OPEN, masked=True))
            device.attach(chip)
            chip.set_level(10, True)
            chip.redirect(10, OPEN)
            assert device.resampled == 0
            assert serve(chip) == 10


async def test_what_waits_while_masked_is_withdrawn_and_what_was_sent_is_not() -> None:
    with devices() as (device,):
        async with active(open_ioapic) as chip:
            chip.redirect(10, replace(OPEN, masked=True))
            device.attach(chip)
            await device.fire()
            device.detach(chip)
            assert chip.counters[10].withdrawn == 1
            assert chip.state().irr == 0
            chip.redirect(10, OPEN)
            assert not chip.asks
            device.attach(chip)
            await device.fire()
            device.detach(chip)
            assert chip.counters[10].withdrawn == 1
            assert serve(chip) == 10
            assert not chip.state().entries[10].remote_irr
            counters = chip.counters[10]
            assert (counters.raised, counters.acknowledged, counters.ended) == (2, 1, 1)


async def test_an_input_that_rises_again_while_its_interrupt_waits_has_raised_one() -> None:
    with devices() as (device,):
        async with active(open_ioapic) as chip:
            for _ in range(2):
                device.attach(chip)
                await device.fire()
                device.detach(chip)
            assert serve(chip) == 10
            assert not chip.asks
            counters = chip.counters[10]
            assert (counters.triggered, counters.raised, counters.acknowledged) == (2, 1, 1)


class VectorModel:
    """Inputs by level into a local APIC, as sets."""

    def __init__(self, vectors: dict[int, int]) -> None:
        self.vectors = vectors
        self.high: set[int] = set()
        self.masked: set[int] = set()
        self.remote: set[int] = set()
        self.waiting: set[int] = set()
        self.serving: list[int] = []

    def send(self) -> None:
        for gsi in self.high - self.masked - self.remote:
            self.remote.add(gsi)
            self.waiting.add(self.vectors[gsi])

    def take(self) -> int | None:
        vector = max(self.waiting, default=0)
        if vector >> 4 <= max((serving >> 4 for serving in self.serving), default=0):
            return None
        self.waiting.remove(vector)
        self.serving.append(vector)
        return vector

    def end(self) -> int:
        vector = self.serving.pop()
        self.remote -= {gsi for gsi in self.remote if self.vectors[gsi] == vector}
        return vector


VECTORS = {3: 0x05, 4: 0x31, 5: 0x31, 10: 0x38, 11: 0x41, 20: 0x42, 23: 0xFE}
_inputs = st.sampled_from(sorted(VECTORS))
_steps = st.one_of(
    st.tuples(st.sampled_from(["level", "mask"]), _inputs, st.booleans()),
    st.tuples(st.sampled_from(["take", "end"]), st.just(0), st.just(False)),
)


@given(st.lists(_steps, max_size=60))
@settings(max_examples=150, derandomize=True)
def test_vectors_interrupt_each_other_by_class(script: list[tuple[str, int, bool]]) -> None:
    chip, model = programmed(), VectorModel(VECTORS)
    for gsi, vector in VECTORS.items():
        chip.redirect(gsi, replace(OPEN, vector=vector))
    for step, gsi, on in script:
        match step:
            case "level":
                chip.set_level(gsi, on)
                (model.high.add if on else model.high.discard)(gsi)
            case "mask":
                chip.redirect(gsi, replace(OPEN, vector=VECTORS[gsi], masked=on))
                (model.masked.add if on else model.masked.discard)(gsi)
            case "take":
                expected, delivery = model.take(), chip.acknowledge()
                assert (delivery.vector if delivery else None) == expected
                assert delivery is None or VECTORS[delivery.gsi] == expected
            case "end" if model.serving:
                chip.end(Delivery(0, model.end()))
        model.send()
        state = chip.state()
        assert state.irr == sum(1 << high for high in model.high)
        assert {gsi for gsi, entry in enumerate(state.entries) if entry.remote_irr} == model.remote
        assert state.local.irr == sum(1 << vector for vector in model.waiting)
        assert state.local.isr == sum(1 << vector for vector in model.serving)
