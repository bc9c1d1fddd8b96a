"""One function that goes from INTx to MSI-X and back, in any order, against plain Python."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from device.interrupts.controller import Interrupts
from device.interrupts.kinds import IrqKind
from device.interrupts.msix import ENTRY_SIZE, VECTOR_CONTROL
from tests.device.interrupts.listener import Listener, listeners

INTX, MSIX = IrqKind.INTX, IrqKind.MSIX
VECTORS = 2

# Which of the listeners can be what; an eventfd of one kind is never that of another.
TRIGGERS = (0, 1)
VECTOR_EARS = (2, 3)
RESAMPLES = (4, 5)
EARS = 6


@dataclass
class Model:
    """vfio_pci_intrs.c for the line, PCI Local Bus 3.0, 6.8.2 for the vectors, and what this card adds to
    both: a line that is plugged anew tells the new listener what the old one may not have read.

    `counts` is what stands unread in each eventfd.
    """

    counts: list[int] = field(default_factory=lambda: [0] * EARS)
    wired: IrqKind | None = None
    msix_enabled: bool = False
    function_mask: bool = False
    silent: bool = False
    # the line
    level: bool = False
    disabled: bool = False
    masked: bool = False
    told: bool = False  # it masked itself, and nobody has unmasked it since
    trigger: int | None = None
    resample: int | None = None
    # the vectors
    plugged: list[int | None] = field(default_factory=lambda: [None] * VECTORS)
    entry_masks: list[bool] = field(default_factory=lambda: [True] * VECTORS)
    held: list[bool] = field(default_factory=lambda: [False] * VECTORS)
    pending: list[bool] = field(default_factory=lambda: [False] * VECTORS)

    @property
    def by_vectors(self) -> bool:
        return self.wired is MSIX or (self.wired is None and self.msix_enabled)

    def settle(self) -> None:
        """Deliver what can be delivered; forget what nobody may deliver any more."""
        for vector in range(VECTORS):
            ear = self.plugged[vector]
            masked = self.function_mask or self.entry_masks[vector] or self.held[vector]
            if not self.by_vectors:
                self.pending[vector] = False
            elif self.pending[vector] and ear is not None and not masked and not self.silent:
                self.pending[vector] = False
                self.counts[ear] += 1
        shut = self.masked or self.disabled or self.silent
        if self.level and self.trigger is not None and not shut:
            self.masked = self.told = True
            self.counts[self.trigger] += 1

    def unmask(self) -> None:
        if self.masked and not self.disabled:
            self.masked = self.told = False
            self.settle()

    def hear_resample(self) -> None:
        if self.resample is not None and self.counts[self.resample]:
            self.counts[self.resample] = 0
            self.unmask()

    def mask(self) -> None:
        self.masked, self.told = True, False

    def notify(self, vector: int) -> None:
        if self.by_vectors:
            self.pending[vector] = True
        else:
            self.level = True
        self.settle()

    def plug_trigger(self, ear: int | None) -> None:
        if self.wired is None:
            self.wired = INTX
            self.masked, self.told = self.disabled, False
        self.trigger = None
        self.hear_resample()
        self.trigger = ear
        if self.told and ear is not None and not (self.level and self.counts[ear]):
            self.masked = self.told = False
        self.settle()

    def plug_resample(self, ear: int | None) -> None:
        self.hear_resample()
        self.resample = ear
        self.hear_resample()

    def unwire(self) -> None:
        if self.wired is INTX:
            self.trigger = None
            self.plug_resample(None)
        elif self.wired is MSIX:
            self.plugged = [None] * VECTORS
            self.held = [False] * VECTORS
        self.wired = None
        self.settle()

    def plug_vector(self, vector: int, ear: int | None) -> None:
        self.wired = MSIX
        self.plugged[vector] = ear
        if ear is not None:
            self.entry_masks[vector] = False
        self.settle()

    def disable_intx(self, disabled: bool) -> None:
        if disabled != self.disabled:
            self.hear_resample()
        if disabled and not self.disabled:
            self.mask()
            self.disabled = True
        elif self.disabled and not disabled:
            self.disabled = False
            self.unmask()

    def reset(self) -> None:
        self.level = False
        self.pending = [False] * VECTORS
        self.entry_masks = [ear is None for ear in self.plugged]
        self.function_mask = self.msix_enabled = False
        self.disable_intx(False)
        self.settle()


class Switching(RuleBasedStateMachine):
    """Any order of everything that card, driver and client can do."""

    def __init__(self) -> None:
        super().__init__()
        self.context = listeners(EARS)
        self.ears: list[Listener] = self.context.__enter__()
        self.interrupts = Interrupts(msix=VECTORS)
        self.model = Model()

    def fd(self, ear: int | None) -> int | None:
        return None if ear is None else self.ears[ear].fd

    # --- the card

    @rule(vector=st.integers(0, VECTORS - 1))
    def the_card_notifies(self, vector: int) -> None:
        self.interrupts.lines.signal(1, vector)
        self.model.notify(vector)

    @rule(silent=st.booleans())
    def the_card_is_stopped_or_goes_on(self, silent: bool) -> None:
        (self.interrupts.silence if silent else self.interrupts.speak)()
        self.model.silent = silent
        self.model.settle()

    @precondition(lambda self: self.model.silent)
    @rule()
    def the_card_becomes_what_it_is(self) -> None:
        """A saved state comes back: wiring and masks of the client are not part of it."""
        self.interrupts.stage(self.interrupts.save())()

    # --- the driver

    @rule()
    def the_driver_reads_the_isr(self) -> None:
        self.interrupts.lines.read_isr()
        self.model.level = False

    @rule(disabled=st.booleans())
    def the_driver_writes_intx_disable(self, disabled: bool) -> None:
        self.interrupts.line.disable(disabled)
        self.model.disable_intx(disabled)

    @rule(enabled=st.booleans(), function_mask=st.booleans())
    def the_driver_writes_the_capability(self, enabled: bool, function_mask: bool) -> None:
        self.interrupts.configure_msix(enabled=enabled, function_mask=function_mask)
        self.model.msix_enabled, self.model.function_mask = enabled, function_mask
        self.model.settle()

    @rule(vector=st.integers(0, VECTORS - 1), masked=st.booleans())
    def the_driver_writes_an_entry(self, vector: int, masked: bool) -> None:
        self.interrupts.msix.table.write(vector * ENTRY_SIZE + VECTOR_CONTROL, 4, int(masked))
        self.model.entry_masks[vector] = masked
        self.model.settle()

    @rule()
    def the_function_is_reset(self) -> None:
        self.interrupts.reset()
        self.interrupts.configure_msix(enabled=False, function_mask=False)
        self.interrupts.line.disable(False)
        self.model.reset()

    # --- the client

    @precondition(lambda self: self.model.wired is not MSIX)
    @rule(ear=st.sampled_from((*TRIGGERS, None)))
    def the_client_plugs_the_line(self, ear: int | None) -> None:
        self.interrupts.set_trigger(INTX, 0, [self.fd(ear)])
        self.model.plug_trigger(ear)

    @precondition(lambda self: self.model.wired is INTX)
    @rule(ear=st.sampled_from((*RESAMPLES, None)))
    def the_client_plugs_the_resample_eventfd(self, ear: int | None) -> None:
        self.interrupts.set_unmask_fd(INTX, self.fd(ear))
        self.model.plug_resample(ear)

    @rule(ear=st.sampled_from(RESAMPLES))
    def the_client_signals_a_resample_eventfd(self, ear: int) -> None:
        self.ears[ear].say()
        self.model.counts[ear] += 1

    @rule()
    def the_server_looks_at_the_resample_eventfd(self) -> None:
        self.interrupts.line.unmask_fd_fired()
        self.model.hear_resample()

    @precondition(lambda self: self.model.wired is INTX)
    @rule(masked=st.booleans())
    def the_client_masks_the_line(self, masked: bool) -> None:
        if masked:
            self.interrupts.mask(INTX, 0, [True])
            self.model.hear_resample()
            self.model.mask()
        else:
            self.interrupts.unmask(INTX, 0, [True])
            self.model.unmask()

    @precondition(lambda self: self.model.wired is not INTX)
    @rule(vector=st.integers(0, VECTORS - 1), ear=st.sampled_from((*VECTOR_EARS, None)))
    def the_client_plugs_a_vector(self, vector: int, ear: int | None) -> None:
        self.interrupts.set_trigger(MSIX, vector, [self.fd(ear)])
        self.model.plug_vector(vector, ear)

    @rule(vector=st.integers(0, VECTORS - 1), held=st.booleans())
    def the_client_masks_a_vector(self, vector: int, held: bool) -> None:
        (self.interrupts.mask if held else self.interrupts.unmask)(MSIX, vector, [True])
        self.model.held[vector] = held
        self.model.settle()

    @precondition(lambda self: self.model.wired is not None)
    @rule()
    def the_client_disables_the_index(self) -> None:
        assert self.model.wired is not None
        self.interrupts.disable(self.model.wired)
        self.model.unwire()

    @rule(ear=st.integers(0, EARS - 3))
    def the_client_reads(self, ear: int) -> None:
        assert self.ears[ear].heard() == self.model.counts[ear]
        self.model.counts[ear] = 0

    # --- what holds

    @invariant()
    def every_eventfd_holds_what_the_model_says(self) -> None:
        found = [ear.heard() for ear in self.ears]
        for ear, count in zip(self.ears, found, strict=True):
            if count:
                os.eventfd_write(ear.fd, count)
        assert found == self.model.counts

    @invariant()
    def the_visible_state_is_the_models(self) -> None:
        lines, model = self.interrupts.lines, self.model
        assert (lines.intx_asserted, lines.intx_disabled) == (model.level, model.disabled)
        assert self.interrupts.active is model.wired
        if model.wired is INTX:
            assert lines.intx_masked == model.masked
        bits = self.interrupts.msix.pba.read(0, 8)
        assert bits == sum(1 << vector for vector, pending in enumerate(model.pending) if pending)

    @invariant()
    def a_high_open_line_was_told_and_no_pending_vector_is_free_to_go(self) -> None:
        lines, model = self.interrupts.lines, self.model
        if model.wired is INTX and model.trigger is not None and not model.silent:
            assert lines.intx_masked or lines.intx_disabled or not lines.intx_asserted
        for vector in range(VECTORS):
            if self.interrupts.msix.deliverable(vector) and not model.silent:
                assert not model.pending[vector]

    def teardown(self) -> None:
        self.interrupts.unwire_all()
        self.context.__exit__(None, None, None)


TestSwitching = Switching.TestCase
