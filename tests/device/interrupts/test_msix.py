"""MSI-X vectors: table, pending bits, and every way a vector becomes deliverable."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from device.interrupts.controller import Interrupts
from device.interrupts.kinds import IrqKind
from device.interrupts.msix import ENTRY_SIZE, MASK_BIT, VECTOR_CONTROL, pba_size
from tests.device.interrupts.listener import Listener, listeners

VECTORS = 3


class Rig:
    """A function's MSI-X vectors, enabled, with a listener for each."""

    def __init__(self, ears: list[Listener]) -> None:
        self.ears = ears
        self.interrupts = Interrupts(msix=len(ears))
        self.interrupts.configure_msix(enabled=True, function_mask=False)

    def wire(self, vector: int) -> None:
        self.interrupts.set_trigger(IrqKind.MSIX, vector, [self.ears[vector].fd])

    def unwire(self, vector: int) -> None:
        self.interrupts.set_trigger(IrqKind.MSIX, vector, [None])

    def mask_entry(self, vector: int, masked: bool) -> None:
        self.interrupts.msix.table.write(vector * ENTRY_SIZE + VECTOR_CONTROL, 4, masked)

    def mask_function(self, masked: bool) -> None:
        self.interrupts.configure_msix(enabled=True, function_mask=masked)

    def hold(self, vector: int) -> None:
        self.interrupts.mask(IrqKind.MSIX, vector, [True])

    def let_go(self, vector: int) -> None:
        self.interrupts.unmask(IrqKind.MSIX, vector, [True])

    def pending(self) -> int:
        return self.interrupts.msix.pba.read(0, 8)

    def heard(self) -> list[int]:
        return [ear.heard() for ear in self.ears]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with listeners(VECTORS) as ears:
        rig = Rig(ears)
        yield rig
        rig.interrupts.unwire_all()


HOLDS: dict[str, tuple[Callable[[Rig], None], Callable[[Rig], None]]] = {
    "entry mask": (lambda rig: rig.mask_entry(1, True), lambda rig: rig.mask_entry(1, False)),
    "function mask": (lambda rig: rig.mask_function(True), lambda rig: rig.mask_function(False)),
    "SET_IRQS MASK": (lambda rig: rig.hold(1), lambda rig: rig.let_go(1)),
    "unplugged": (lambda rig: rig.unwire(1), lambda rig: rig.wire(1)),
    "entry mask, plugged anew": (lambda rig: rig.mask_entry(1, True), lambda rig: rig.wire(1)),
}


@pytest.mark.parametrize("way", HOLDS)
def test_a_vector_raised_while_held_back_is_delivered_once_on_release(rig: Rig, way: str) -> None:
    hold, let_go = HOLDS[way]
    for vector in range(VECTORS):
        rig.wire(vector)
    hold(rig)
    rig.interrupts.signal(1)
    rig.interrupts.signal(1)
    assert rig.heard() == [0, 0, 0]
    assert rig.pending() == 0b010
    let_go(rig)
    assert rig.heard() == [0, 1, 0]
    assert rig.pending() == 0
    rig.interrupts.signal(1)
    assert rig.heard() == [0, 1, 0]


@pytest.mark.parametrize("way", HOLDS)
def test_nothing_is_delivered_on_release_if_nothing_was_raised(rig: Rig, way: str) -> None:
    hold, let_go = HOLDS[way]
    rig.wire(1)
    hold(rig)
    let_go(rig)
    assert rig.heard() == [0, 0, 0]


def test_wiring_clears_the_mask_bit_that_power_on_sets(rig: Rig) -> None:
    control = rig.interrupts.msix.table.read
    assert control(ENTRY_SIZE + VECTOR_CONTROL, 4) == MASK_BIT
    rig.wire(1)
    assert control(ENTRY_SIZE + VECTOR_CONTROL, 4) == 0
    assert control(2 * ENTRY_SIZE + VECTOR_CONTROL, 4) == MASK_BIT


def test_entries_keep_what_software_writes_but_reserved_control_bits(rig: Rig) -> None:
    table = rig.interrupts.msix.table
    table.write(16, 8, 0x11223344_FEE01004)
    table.write(24, 8, 0xFFFFFFFF_00004021)
    assert table.read(16, 8) == 0x11223344_FEE01004
    assert table.read(24, 8) == 0x00000001_00004021


@pytest.mark.parametrize("within", [12, 13, 14, 15])
def test_narrow_writes_to_vector_control_reach_the_mask_bit_alone(rig: Rig, within: int) -> None:
    table = rig.interrupts.msix.table
    table.write(12, 4, 0)
    table.write(within, 1, 0xFF)
    assert table.read(12, 4) == (MASK_BIT if within == 12 else 0)


def test_the_pending_bits_cannot_be_written(rig: Rig) -> None:
    rig.interrupts.signal(0)
    rig.interrupts.msix.pba.write(0, 8, 0)
    assert rig.pending() == 0b001


def test_a_reset_forgets_pending_bits_and_keeps_wired_vectors_working(rig: Rig) -> None:
    rig.wire(0)
    rig.mask_entry(0, True)
    rig.interrupts.msix.table.write(0, 4, 0xFEE00000)
    rig.interrupts.signal(0)
    rig.interrupts.signal(2)
    rig.interrupts.reset()
    assert rig.pending() == 0
    assert rig.interrupts.msix.table.read(0, 4) == 0
    assert rig.interrupts.msix.table.read(2 * ENTRY_SIZE + VECTOR_CONTROL, 4) == MASK_BIT
    rig.interrupts.signal(0)
    assert rig.heard() == [1, 0, 0]


def test_what_is_pending_survives_a_client_that_wires_its_set_anew(rig: Rig) -> None:
    rig.wire(0)
    rig.interrupts.signal(1)
    rig.interrupts.disable(IrqKind.MSIX)
    rig.interrupts.set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in rig.ears])
    assert rig.heard() == [0, 1, 0]


@given(st.integers(1, 200), st.data())
def test_any_read_of_the_pending_bit_array_shows_the_raised_vectors(
    vectors: int, data: st.DataObject
) -> None:
    interrupts = Interrupts(msix=vectors)
    interrupts.configure_msix(enabled=True, function_mask=False)
    raised = data.draw(st.sets(st.integers(0, vectors - 1)))
    for vector in raised:
        interrupts.signal(vector)
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    offset = data.draw(st.integers(0, pba_size(vectors) // size - 1)) * size
    whole = sum(1 << vector for vector in raised)
    assert interrupts.msix.pba.read(offset, size) == whole >> offset * 8 & (1 << size * 8) - 1


class EveryWayToUnmask(RuleBasedStateMachine):
    """One vector against a model of six booleans.

    A raised vector is heard once, as soon as and only while it may be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context = listeners(1)
        self.rig = Rig(self.context.__enter__())
        self.wired = False
        self.holds = {"entry": True, "function": False, "client": False}
        self.raised = False
        self.expected = 0

    def settle(self) -> None:
        if self.raised and self.wired and not any(self.holds.values()):
            self.expected += 1
            self.raised = False

    @initialize()
    def begin(self) -> None:
        self.rig.interrupts.set_trigger(IrqKind.MSIX, 0, [None])

    @rule()
    def the_card_raises(self) -> None:
        self.rig.interrupts.signal(0)
        self.raised = True
        self.settle()

    @rule()
    def the_client_plugs(self) -> None:
        self.rig.wire(0)
        self.wired = True
        self.holds["entry"] = False
        self.settle()

    @rule()
    def the_client_unplugs(self) -> None:
        self.rig.unwire(0)
        self.wired = False

    @rule(masked=st.booleans())
    def the_driver_writes_the_entry(self, masked: bool) -> None:
        self.rig.mask_entry(0, masked)
        self.holds["entry"] = masked
        self.settle()

    @rule(masked=st.booleans())
    def the_driver_writes_the_function_mask(self, masked: bool) -> None:
        self.rig.mask_function(masked)
        self.holds["function"] = masked
        self.settle()

    @rule(held=st.booleans())
    def the_client_masks(self, held: bool) -> None:
        (self.rig.hold if held else self.rig.let_go)(0)
        self.holds["client"] = held
        self.settle()

    @rule()
    def the_function_is_reset(self) -> None:
        self.rig.interrupts.reset()
        self.rig.mask_function(False)
        self.raised = False
        self.holds["entry"] = not self.wired
        self.holds["function"] = False

    @invariant()
    def the_listener_heard_what_the_model_says(self) -> None:
        assert self.rig.heard() == [self.expected]
        self.expected = 0

    @invariant()
    def the_pending_bit_is_what_was_raised_and_not_heard(self) -> None:
        assert self.rig.pending() == int(self.raised)

    def teardown(self) -> None:
        self.rig.interrupts.unwire_all()
        self.context.__exit__(None, None, None)


TestEveryWayToUnmask = EveryWayToUnmask.TestCase
