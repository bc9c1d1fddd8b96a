from __future__ import annotations

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.irqchip import InterruptController, IntxMode, IntxRoute, IrqchipError
from client.irqchip.userspace import Delivery, Pic, open_pic
from tests.client.irqchip.userspace.test_chip import active, devices

MASTER, SLAVE, ELCR = 0x20, 0xA0, 0x4D0
EOI, POLL, READ_IRR, READ_ISR = 0x20, 0x0C, 0x0A, 0x0B
LEVELS = (3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15)


def programmed(**how: int) -> Pic:
    chip = Pic()
    chip.program(**how)
    chip.activate()
    return chip


def initialize(chip: Pic, port: int, icw1: int, *words: int) -> None:
    chip.write(port, icw1)
    for word in words:
        chip.write(port + 1, word)


def take(chip: Pic) -> Delivery | None:
    """The next interrupt, past spurious ones."""
    while chip.asks:
        if (delivery := chip.acknowledge()) is not None:
            return delivery
    return None


def taken(chip: Pic) -> int:
    delivery = take(chip)
    assert delivery is not None
    return delivery.gsi


def test_it_is_programmed_as_firmware_does() -> None:
    state = programmed(vectors=0x43, level=0xFFFF).state()
    assert (state.master.irq_base, state.slave.irq_base) == (0x40, 0x48), (
        "vectors of eight have one beginning"
    )
    assert state.elcr == sum(1 << gsi for gsi in LEVELS), "the others are edges in every PC"
    assert (state.imr, state.irr, state.isr) == (0, 0, 0)


def test_after_power_on_nothing_is_level_triggered_and_all_inputs_are_open() -> None:
    state = Pic().state()
    assert (state.elcr, state.imr, state.master.irq_base) == (0, 0, 0)


@pytest.mark.parametrize(("gsi", "vector"), [(0, 0x20), (7, 0x27), (8, 0x28), (15, 0x2F)])
def test_each_input_has_its_vector(gsi: int, vector: int) -> None:
    chip = programmed()
    chip.set_level(gsi, True)
    assert chip.acknowledge() == Delivery(gsi, vector)
    assert chip.state().isr == 1 << gsi | (1 << 2 if gsi >= 8 else 0)
    chip.set_level(gsi, False)
    chip.end(Delivery(gsi, vector))
    assert (chip.state().isr, chip.state().irr, chip.asks) == (0, 0, False)


def test_a_level_interrupts_until_it_falls_and_an_edge_once() -> None:
    chip = programmed(level=1 << 10)
    for gsi in (10, 11):
        chip.set_level(gsi, True)
    for expected in (10, 10):
        assert taken(chip) == expected
        chip.end(Delivery(expected, 0))
    chip.set_level(10, False)
    assert chip.state().slave.irr == 1 << 3
    assert taken(chip) == 11
    chip.end(Delivery(11, 0))
    assert take(chip) is None
    chip.set_level(11, True)
    assert take(chip) is None, "that is no edge"
    chip.set_level(11, False)
    chip.set_level(11, True)
    chip.set_level(11, False)
    assert taken(chip) == 11, "an edge is remembered"


def test_a_request_that_vanishes_is_a_spurious_interrupt() -> None:
    chip = programmed()
    chip.set_level(10, True)
    assert chip.asks
    chip.set_level(10, False)
    assert chip.asks, "the master remembers that the slave asked"
    assert chip.acknowledge() is None
    assert chip.spurious == 1
    assert (chip.state().isr, chip.asks) == (0, False)
    assert chip.counters[10].withdrawn == 1


def test_a_guest_sees_spurious_vectors_of_both_halves() -> None:
    chip = programmed()
    assert chip.intack() == 0x27
    assert chip.state().isr == 0
    chip.set_level(10, True)
    chip.set_level(10, False)
    assert chip.intack() == 0x2F
    assert chip.state().isr == 1 << 2, "which the guest must end"
    assert chip.spurious == 2


def test_a_masked_input_waits() -> None:
    chip = programmed()
    chip.write(SLAVE + 1, 1 << 2)
    chip.set_level(10, True)
    assert not chip.asks
    assert chip.state().irr == 1 << 10
    chip.write(SLAVE + 1, 0)
    assert taken(chip) == 10


def test_the_cascade_is_no_input_of_anybody() -> None:
    chip = programmed()
    assert [gsi for gsi in range(-1, 18) if not chip.has_input(gsi)] == [-1, 2, 16, 17]
    with pytest.raises(IrqchipError) as error:
        chip.set_level(2, True)
    assert error.value.errno == errno.EINVAL
    with pytest.raises(IrqchipError):
        InterruptController(chip, [IntxRoute(IntxMode.ENABLED, 2)])


@pytest.mark.parametrize("port", [0x1F, 0x22, 0xA2, 0x4CF, 0x4D2])
def test_other_ports_are_not_its_own(port: int) -> None:
    chip = programmed()
    with pytest.raises(IrqchipError) as error:
        chip.read(port)
    assert error.value.errno == errno.ENXIO
    with pytest.raises(IrqchipError):
        chip.write(port, 0)


def test_registers_are_read_as_the_guest_chose() -> None:
    chip = programmed()
    chip.set_level(5, True)
    chip.write(MASTER + 1, 0x81)
    assert chip.read(MASTER + 1) == 0x81
    assert chip.read(MASTER) == 1 << 5
    chip.intack()
    chip.set_level(5, False)
    assert chip.read(MASTER) == 0
    chip.write(MASTER, READ_ISR)
    assert chip.read(MASTER) == 1 << 5
    chip.write(MASTER, READ_IRR)
    assert chip.read(MASTER) == 0
    assert chip.read(ELCR) == 0xF8
    assert chip.read(ELCR + 1) == 0xDE


def test_unspecific_ends_end_the_highest_and_specific_ones_what_they_name() -> None:
    chip = programmed()
    chip.set_level(5, True)
    chip.intack()
    chip.set_level(3, True)
    chip.intack()
    assert chip.state().isr == 1 << 5 | 1 << 3
    chip.write(MASTER, 0x60 | 5)
    assert chip.state().isr == 1 << 3
    chip.write(MASTER, EOI)
    assert chip.state().isr == 0
    chip.write(MASTER, EOI)
    assert chip.state().isr == 0


def test_priorities_rotate() -> None:
    chip = programmed()
    chip.write(MASTER, 0xC0 | 4)  # input 4 has the lowest priority now
    chip.set_level(3, True)
    chip.set_level(5, True)
    assert taken(chip) == 5
    chip.write(MASTER, 0xA0)  # end, and 5 is the lowest
    assert taken(chip) == 3
    chip.write(MASTER, 0xE0 | 3)  # the same, specific
    assert chip.state().master.priority_add == 4
    assert taken(chip) == 5


def test_with_automatic_end_of_interrupt_an_acknowledgement_ends_it_and_may_rotate() -> None:
    chip = programmed(level=0)
    initialize(chip, MASTER, 0x11, 0x20, 4, 0x03)
    chip.write(MASTER, 0x80)  # rotate then
    chip.set_level(3, True)
    assert taken(chip) == 3
    assert chip.state().isr == 0
    assert chip.state().master.priority_add == 4
    chip.end(Delivery(3, 0x23))
    assert chip.counters[3].ended == 1


def test_without_icw4_automatic_end_of_interrupt_is_off() -> None:
    chip = programmed()
    initialize(chip, MASTER, 0x11, 0x20, 4, 0x13)
    assert chip.state().master.auto_eoi == chip.state().master.special_fully_nested_mode == 1
    initialize(chip, MASTER, 0x10, 0x30, 4)
    master = chip.state().master
    assert (master.auto_eoi, master.special_fully_nested_mode, master.init_state) == (0, 0, 0)
    assert master.irq_base == 0x30


def test_in_special_fully_nested_mode_the_slave_may_interrupt_itself() -> None:
    chip = programmed()
    for nested in (False, True):
        initialize(chip, MASTER, 0x11, 0x20, 4, 0x11 if nested else 0x01)
        chip.set_level(12, True)
        low = chip.acknowledge()
        chip.set_level(9, True)
        assert chip.asks is nested
        if nested:
            high = chip.acknowledge()
            assert high is not None
            assert high.gsi == 9
            chip.set_level(9, False)
            chip.end(high)
            assert chip.state().master.isr == 1 << 2, "the slave still serves one"
        assert low is not None
        for gsi in (9, 12):
            chip.set_level(gsi, False)
        chip.end(low)
        assert chip.state().isr == 0


def test_special_fully_nested_mode_means_nothing_to_the_slave() -> None:
    chip = programmed()
    initialize(chip, SLAVE, 0x11, 0x28, 2, 0x11)
    chip.set_level(10, True)
    assert taken(chip) == 10
    chip.write(MASTER, 0x62)
    chip.set_level(11, True)
    assert not chip.asks


def test_initialization_forgets_edges_and_no_levels() -> None:
    chip = programmed(level=1 << 5)
    for gsi in (4, 5):
        chip.set_level(gsi, True)
    initialize(chip, MASTER, 0x11, 0x20, 4, 0x01)
    assert chip.state().master.irr == 1 << 5
    assert chip.state().master.last_irr == 0


def test_an_end_of_what_is_not_in_service_is_none() -> None:
    chip = programmed()
    chip.write(MASTER, 0x60 | 5)
    chip.end(Delivery(5, 0x25))
    chip.end(Delivery(10, 0x2A))
    assert chip.counters[5].ended == chip.counters[10].ended == 0


def test_an_end_suits_halves_of_different_modes() -> None:
    chip = programmed(level=0)
    initialize(chip, SLAVE, 0x11, 0x28, 2, 0x03)  # automatic end of interrupt for the slave alone
    chip.set_level(10, True)
    delivery = chip.acknowledge()
    assert delivery is not None
    assert chip.state().isr == 1 << 2
    chip.end(delivery)
    assert chip.state().isr == 0


def test_a_poll_takes_and_ends_what_waits() -> None:
    chip = programmed(level=0)
    chip.set_level(5, True)
    chip.set_level(10, True)
    chip.write(SLAVE, POLL)
    assert chip.read(SLAVE) == 0x82
    chip.write(MASTER, POLL)
    assert chip.read(MASTER) == 0x85
    chip.write(MASTER, POLL)
    assert chip.read(MASTER) == 7
    assert not chip.asks
    for gsi in (5, 10):
        counters = chip.counters[gsi]
        assert (counters.raised, counters.acknowledged, counters.ended) == (1, 1, 1)


def test_a_level_that_was_polled_interrupts_again_when_it_is_driven_again() -> None:
    chip = programmed()
    chip.set_level(5, True)
    chip.write(MASTER, POLL)
    assert chip.read(MASTER) == 0x85
    assert not chip.asks
    chip.set_level(5, True)
    assert taken(chip) == 5


def test_a_poll_of_the_cascade_leads_to_the_slave() -> None:
    chip = programmed(level=0)
    chip.set_level(10, True)
    chip.write(MASTER, POLL)
    assert chip.read(MASTER) == 0x82
    assert not chip.state().master.irr, "the slave, which will be polled, does not ask again"
    chip.write(SLAVE, POLL)
    assert chip.read(SLAVE) == 0x82
    assert chip.state().irr == 0


async def test_an_interrupt_that_no_cpu_has_taken_falls_with_its_line() -> None:
    with devices() as (device,):
        async with active(open_pic) as chip:
            device.attach(chip)
            await device.fire()
            assert chip.state().irr >> 10 & 1
            device.detach(chip)
            assert not chip.state().irr >> 10 & 1
            assert chip.acknowledge() is None
            counters = chip.counters[10]
            assert (counters.raised, counters.withdrawn, counters.acknowledged) == (1, 1, 0)
            assert device.resampled == 0


async def test_an_edge_cannot_be_taken_back() -> None:
    with devices() as (device,):
        async with open_pic() as chip:
            chip.program(level=0)
            chip.activate()
            device.attach(chip)
            await device.fire()
            device.detach(chip)
            assert taken(chip) == 10
            assert (chip.counters[10].withdrawn, chip.counters[10].acknowledged) == (0, 1)


async def test_a_new_interrupt_while_one_of_a_former_eventfd_is_in_service_is_resampled_at_its_end() -> None:
    with devices(2) as (old, new):
        async with active(open_pic) as chip:
            old.attach(chip)
            await old.fire()
            delivery = chip.acknowledge()
            old.detach(chip)
            new.attach(chip)
            await new.fire()
            assert delivery is not None
            chip.end(delivery)
            assert (old.resampled, new.resampled) == (0, 1)
            assert not chip.asks
            counters = chip.counters[10]
            assert (counters.raised, counters.acknowledged, counters.resampled) == (2, 1, 1)


async def test_what_initialization_forgets_its_devices_are_asked_for_again() -> None:
    with devices() as (device,):
        async with open_pic() as chip:
            chip.program(level=0)
            chip.activate()
            chip.write(SLAVE + 1, 0xFF)
            device.attach(chip)
            await device.fire()
            assert chip.state().slave.irr == 1 << 2
            chip.program(level=0)
            assert chip.state().slave.irr == 0
            assert device.resampled == 1
            await device.fire()
            assert taken(chip) == 10


async def test_it_can_be_had_as_after_power_on() -> None:
    async with open_pic("bare", programmed=False) as chip:
        assert chip.name == "bare"
        assert chip.state().master.irq_base == 0


class NestedModel:
    """Level-triggered inputs, fully nested: who may interrupt whom, told by ranks alone."""

    ORDER = (0, 1, 8, 9, 10, 11, 12, 13, 14, 15, 3, 4, 5, 6, 7)

    def __init__(self) -> None:
        self.high: set[int] = set()
        self.masked: set[int] = set()
        self.serving: list[int] = []

    @staticmethod
    def rank(gsi: int) -> int:
        """Of the master's input; all of the slave's are one."""
        return 2 if gsi >= 8 else gsi

    def next(self) -> int | None:
        for gsi in self.ORDER:
            if gsi in self.high and gsi not in self.masked and not (gsi >= 8 and 2 in self.masked):
                free = all(self.rank(gsi) < self.rank(other) for other in self.serving)
                return gsi if free else None
        return None


_steps = st.one_of(
    st.tuples(st.just("level"), st.sampled_from(LEVELS), st.booleans()),
    st.tuples(st.just("mask"), st.sampled_from((2, *LEVELS)), st.booleans()),
    st.tuples(st.sampled_from(["take", "end"]), st.none(), st.none()),
)


@given(st.lists(_steps, max_size=60))
@settings(max_examples=150, derandomize=True)
def test_levels_interrupt_each_other_by_priority(script: list[tuple[str, int | None, bool | None]]) -> None:
    chip, model = programmed(), NestedModel()
    for step, gsi, on in script:
        match step:
            case "level":
                assert gsi is not None
                chip.set_level(gsi, bool(on))
                (model.high.add if on else model.high.discard)(gsi)
            case "mask":
                assert gsi is not None
                (model.masked.add if on else model.masked.discard)(gsi)
                mask = sum(1 << masked for masked in model.masked)
                chip.write(MASTER + 1, mask & 0xFF)
                chip.write(SLAVE + 1, mask >> 8)
            case "take":
                expected, delivery = model.next(), take(chip)
                assert (delivery.gsi if delivery else None) == expected
                if expected is not None:
                    model.serving.append(expected)
            case "end" if model.serving:
                chip.end(Delivery(model.serving.pop(), 0))
        state = chip.state()
        assert state.irr & ~(1 << 2) == sum(1 << high for high in model.high)
        assert state.isr & ~(1 << 2) == sum(1 << serving for serving in model.serving)
        assert bool(state.isr & 1 << 2) == any(serving >= 8 for serving in model.serving)
        if model.next() is not None:
            assert chip.asks
