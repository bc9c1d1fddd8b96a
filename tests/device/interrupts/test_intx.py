"""INTx: a level, with the kernel's rules for eventfds and masks."""

from collections.abc import Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from device.interrupts.controller import Interrupts
from device.interrupts.kinds import IrqKind
from tests.device.interrupts.listener import Listener, listeners

INTX = IrqKind.INTX


class Rig:
    """INTx wired to a listener, and a resample eventfd."""

    def __init__(self, ear: Listener, resample: Listener) -> None:
        self.ear = ear
        self.resample = resample
        self.interrupts = Interrupts()
        self.interrupts.set_trigger(INTX, 0, [ear.fd])

    def unmask(self) -> None:
        self.interrupts.unmask(INTX, 0, [True])


@pytest.fixture
def rig() -> Iterator[Rig]:
    with listeners(2) as (ear, resample):
        rig = Rig(ear, resample)
        yield rig
        rig.interrupts.unwire_all()


def test_an_assertion_signals_once_and_masks_itself(rig: Rig) -> None:
    rig.interrupts.intx(True)
    rig.interrupts.intx(True)
    rig.interrupts.intx(False)
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1


def test_unmasking_while_the_level_is_high_signals_again(rig: Rig) -> None:
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1
    rig.unmask()
    assert rig.ear.heard() == 1
    rig.interrupts.intx(False)
    rig.unmask()
    assert rig.ear.heard() == 0
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1


def test_the_resample_eventfd_unmasks_as_the_message_does(rig: Rig) -> None:
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1
    rig.interrupts.line.unmask_fd_fired()
    assert rig.ear.heard() == 0, "it was not signalled"
    rig.resample.say()
    rig.resample.say()
    rig.interrupts.line.unmask_fd_fired()
    assert rig.ear.heard() == 1
    assert rig.resample.heard() == 0, "the card drains it"


def test_a_new_resample_eventfd_replaces_the_old_one(rig: Rig) -> None:
    with listeners(1) as (other,):
        rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
        rig.interrupts.set_unmask_fd(INTX, other.fd)
        rig.interrupts.intx(True)
        assert rig.ear.heard() == 1
        rig.resample.say()
        rig.interrupts.line.unmask_fd_fired()
        assert rig.ear.heard() == 0
        other.say()
        rig.interrupts.line.unmask_fd_fired()
        assert rig.ear.heard() == 1


def test_what_the_old_resample_eventfd_was_told_still_counts(rig: Rig) -> None:
    with listeners(1) as (other,):
        rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
        rig.interrupts.intx(True)
        assert rig.ear.heard() == 1
        rig.resample.say()
        rig.interrupts.set_unmask_fd(INTX, other.fd)
        assert rig.ear.heard() == 1
        rig.resample.say()
        rig.interrupts.line.unmask_fd_fired()
        assert rig.ear.heard() == 0, "from then on it says nothing"


@pytest.mark.parametrize("taken", ["unwired", "disabled"])
def test_a_resample_eventfd_that_is_taken_away_is_left_read(rig: Rig, taken: str) -> None:
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    rig.interrupts.intx(True)
    rig.interrupts.intx(False)
    rig.resample.say()
    if taken == "unwired":
        rig.interrupts.set_unmask_fd(INTX, None)
        assert not rig.interrupts.lines.intx_masked
    else:
        rig.interrupts.disable(INTX)
    assert rig.resample.heard() == 0


def test_a_resample_eventfd_that_was_signalled_before_unmasks_when_it_is_wired(rig: Rig) -> None:
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1
    rig.resample.say()
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    assert rig.ear.heard() == 1
    assert rig.resample.heard() == 0


def test_a_mask_comes_after_the_unmasking_that_was_signalled_before_it(rig: Rig) -> None:
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1
    rig.resample.say()
    rig.interrupts.mask(INTX, 0, [True])
    assert rig.ear.heard() == 1, "the level was high when it was unmasked"
    rig.interrupts.line.unmask_fd_fired()
    assert rig.ear.heard() == 0
    assert rig.interrupts.lines.intx_masked


def test_intx_disable_comes_after_the_unmasking_that_was_signalled_before_it(rig: Rig) -> None:
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1
    rig.interrupts.intx(False)
    rig.resample.say()
    rig.interrupts.line.disable(True)
    rig.interrupts.intx(True)
    rig.interrupts.line.disable(False)
    rig.interrupts.line.unmask_fd_fired()
    assert rig.ear.heard() == 1, "nobody has ended it since"


def test_what_the_resample_eventfd_says_while_intx_is_disabled_counts_for_nothing(rig: Rig) -> None:
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    rig.interrupts.line.disable(True)
    rig.interrupts.intx(True)
    rig.resample.say()
    rig.interrupts.line.disable(False)
    rig.interrupts.line.unmask_fd_fired()
    assert rig.ear.heard() == 1


def test_disabling_the_index_forgets_the_resample_eventfd(rig: Rig) -> None:
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    rig.interrupts.disable(INTX)
    assert rig.interrupts.line.unmask_fd is None
    rig.interrupts.line.unmask_fd_fired()


def test_the_steps_of_qemu_towards_kvm_lose_and_double_nothing(rig: Rig) -> None:
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1
    rig.interrupts.mask(INTX, 0, [True])
    rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
    rig.unmask()
    assert rig.ear.heard() == 1
    rig.interrupts.mask(INTX, 0, [True])
    rig.interrupts.set_unmask_fd(INTX, None)
    rig.unmask()
    assert rig.ear.heard() == 1


def test_a_level_that_rose_before_the_wiring_is_signalled_by_it() -> None:
    with listeners(1) as (ear,):
        interrupts = Interrupts()
        interrupts.intx(True)
        interrupts.set_trigger(INTX, 0, [ear.fd])
        assert ear.heard() == 1
        interrupts.unwire_all()


def test_another_trigger_eventfd_hears_of_a_high_line(rig: Rig) -> None:
    with listeners(1) as (other,):
        rig.interrupts.intx(True)
        rig.interrupts.set_trigger(INTX, 0, [other.fd])
        assert (rig.ear.heard(), other.heard()) == (1, 1)


def test_the_same_trigger_eventfd_wired_again_is_not_told_twice(rig: Rig) -> None:
    rig.interrupts.intx(True)
    rig.interrupts.set_trigger(INTX, 0, [rig.ear.fd])
    assert rig.ear.heard() == 1
    rig.interrupts.set_trigger(INTX, 0, [rig.ear.fd])
    assert rig.ear.heard() == 1, "it was read, and by whom nobody knows"
    rig.unmask()
    assert rig.ear.heard() == 1


def test_a_line_that_went_low_is_open_after_another_wiring_whatever_is_unread(rig: Rig) -> None:
    rig.interrupts.intx(True)
    rig.interrupts.intx(False)
    rig.interrupts.set_trigger(INTX, 0, [rig.ear.fd])
    assert not rig.interrupts.lines.intx_masked
    assert rig.ear.heard() == 1
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1, "whoever emptied the eventfd unseen is told all the same"


def test_the_old_trigger_eventfd_is_left_alone_by_an_unmasking_before_the_new_one(rig: Rig) -> None:
    with listeners(1) as (other,):
        rig.interrupts.set_unmask_fd(INTX, rig.resample.fd)
        rig.interrupts.intx(True)
        assert rig.ear.heard() == 1
        rig.resample.say()
        rig.interrupts.set_trigger(INTX, 0, [other.fd])
        rig.interrupts.line.unmask_fd_fired()
        assert (rig.ear.heard(), other.heard()) == (0, 1)


def test_a_trigger_eventfd_that_is_taken_away_is_made_up_for_by_the_next(rig: Rig) -> None:
    rig.interrupts.set_trigger(INTX, 0, [None])
    rig.interrupts.intx(True)
    rig.unmask()
    rig.interrupts.set_trigger(INTX, 0, [rig.ear.fd])
    assert rig.ear.heard() == 1


@pytest.mark.parametrize("when", ["before it is taken away", "meanwhile"])
def test_what_the_host_masked_stays_masked_through_another_wiring(rig: Rig, when: str) -> None:
    if when == "meanwhile":
        rig.interrupts.set_trigger(INTX, 0, [None])
    rig.interrupts.mask(INTX, 0, [True])
    rig.interrupts.set_trigger(INTX, 0, [None])
    rig.interrupts.intx(True)
    rig.interrupts.set_trigger(INTX, 0, [rig.ear.fd])
    assert rig.ear.heard() == 0
    rig.unmask()
    assert rig.ear.heard() == 1


def test_a_line_wired_while_it_is_disabled_waits_for_intx_disable_to_go(rig: Rig) -> None:
    rig.interrupts.line.disable(True)
    rig.interrupts.disable(INTX)
    rig.interrupts.set_trigger(INTX, 0, [rig.ear.fd])
    rig.interrupts.intx(True)
    rig.interrupts.set_trigger(INTX, 0, [rig.ear.fd])
    rig.unmask()
    assert rig.ear.heard() == 0
    rig.interrupts.line.disable(False)
    assert rig.ear.heard() == 1


def test_a_disabled_line_is_silent_and_catches_up_when_enabled(rig: Rig) -> None:
    rig.interrupts.line.disable(True)
    rig.interrupts.intx(True)
    rig.unmask()
    assert rig.ear.heard() == 0
    rig.interrupts.line.disable(False)
    assert rig.ear.heard() == 1


def test_masking_a_low_line_waits_for_the_unmask(rig: Rig) -> None:
    rig.interrupts.mask(INTX, 0, [True])
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 0
    rig.unmask()
    assert rig.ear.heard() == 1


def test_masks_that_choose_nothing_change_nothing(rig: Rig) -> None:
    rig.interrupts.mask(INTX, 0, [False])
    rig.interrupts.intx(True)
    assert rig.ear.heard() == 1
    rig.interrupts.unmask(INTX, 0, [False])
    assert rig.ear.heard() == 0


class KernelLine:
    """vfio_pci_intrs.c for a device that can disable INTx, as plain booleans.

    `signals` counts what the eventfd took.
    """

    def __init__(self) -> None:
        self.asserted = self.masked = self.disabled = self.wired = False
        self.signals = 0

    def look(self) -> None:
        if self.asserted and self.wired and not self.masked and not self.disabled:
            self.masked = True
            self.signals += 1

    def unmask(self) -> None:
        if self.masked and not self.disabled:
            self.masked = False
            self.look()


class LikeTheKernel(RuleBasedStateMachine):
    """Any order of everything: the line does what the kernel's would."""

    def __init__(self) -> None:
        super().__init__()
        self.context = listeners(2)
        self.ear, self.resample = self.context.__enter__()
        self.interrupts = Interrupts(msix=1)
        self.model = KernelLine()

    @rule(level=st.booleans())
    def the_card_drives(self, level: bool) -> None:
        self.interrupts.intx(level)
        self.model.asserted = level
        self.model.look()

    @precondition(lambda self: not self.model.wired)
    @rule()
    def the_client_wires(self) -> None:
        self.interrupts.set_trigger(INTX, 0, [self.ear.fd])
        self.model.wired = True
        self.model.masked = self.model.disabled
        self.model.look()

    @precondition(lambda self: self.model.wired)
    @rule()
    def the_client_disables_the_index(self) -> None:
        self.interrupts.disable(INTX)
        self.model.wired = False

    @precondition(lambda self: self.model.wired)
    @rule()
    def the_client_masks(self) -> None:
        self.interrupts.mask(INTX, 0, [True])
        self.model.masked = True

    @precondition(lambda self: self.model.wired)
    @rule()
    def the_client_unmasks_by_message(self) -> None:
        self.interrupts.unmask(INTX, 0, [True])
        self.model.unmask()

    @precondition(lambda self: self.model.wired)
    @rule()
    def the_client_unmasks_by_eventfd(self) -> None:
        self.interrupts.set_unmask_fd(INTX, self.resample.fd)
        self.resample.say()
        self.interrupts.line.unmask_fd_fired()
        self.model.unmask()

    @rule(disabled=st.booleans())
    def the_driver_writes_intx_disable(self, disabled: bool) -> None:
        self.interrupts.line.disable(disabled)
        if disabled and not self.model.disabled:
            self.model.masked = self.model.disabled = True
        elif self.model.disabled and not disabled:
            self.model.disabled = False
            self.model.unmask()

    @rule()
    def the_function_is_reset(self) -> None:
        self.interrupts.reset()
        self.interrupts.line.disable(False)
        self.model.asserted = False
        if self.model.disabled:
            self.model.disabled = False
            self.model.unmask()

    @precondition(lambda self: not self.model.wired)
    @rule()
    def the_client_tries_msix_for_a_while(self) -> None:
        self.interrupts.set_trigger(IrqKind.MSIX, 0, [None])
        self.interrupts.disable(IrqKind.MSIX)

    @invariant()
    def the_eventfd_took_what_the_kernel_would_have_signalled(self) -> None:
        assert self.ear.heard() == self.model.signals
        self.model.signals = 0

    @invariant()
    def a_high_open_line_never_goes_unheard(self) -> None:
        lines = self.interrupts.lines
        assert not (
            lines.intx_asserted and self.model.wired and not lines.intx_masked and not lines.intx_disabled
        )

    @invariant()
    def the_visible_state_is_the_models(self) -> None:
        lines = self.interrupts.lines
        assert (lines.intx_asserted, lines.intx_disabled) == (self.model.asserted, self.model.disabled)
        if self.model.wired:
            assert lines.intx_masked == self.model.masked

    def teardown(self) -> None:
        self.interrupts.unwire_all()
        self.context.__exit__(None, None, None)


class WellBehavedClient(RuleBasedStateMachine):
    """A client that unmasks only what it consumed.

    While the level is high it always has a trigger or an unmask to give.

    Triggers are counted, not consumed at once, so that a second one before the first is consumed shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context = listeners(3)
        self.ears = self.context.__enter__()
        self.ear, self.resample = self.ears[0], self.ears[2]
        self.interrupts = Interrupts()
        self.interrupts.set_trigger(INTX, 0, [self.ear.fd])
        self.level = self.disabled = False
        self.unconsumed = 0
        self.serviced = False  # consumed a trigger and has not unmasked since

    def collect(self) -> None:
        self.unconsumed += self.ear.heard()

    @rule(level=st.booleans())
    def the_card_drives(self, level: bool) -> None:
        self.interrupts.intx(level)
        self.level = level

    @precondition(lambda self: self.unconsumed)
    @rule()
    def the_client_consumes(self) -> None:
        self.unconsumed = 0
        self.serviced = True

    @precondition(lambda self: self.serviced)
    @rule(by_eventfd=st.booleans())
    def the_client_unmasks(self, by_eventfd: bool) -> None:
        self.serviced = False
        if by_eventfd:
            self.interrupts.set_unmask_fd(INTX, self.resample.fd)
            self.resample.say()
            self.interrupts.line.unmask_fd_fired()
        else:
            self.interrupts.unmask(INTX, 0, [True])

    @rule()
    def the_irqchip_changes(self) -> None:
        """Mask, forget what came, wire another eventfd, unmask: as QEMU when its irqchip is replaced."""
        self.interrupts.mask(INTX, 0, [True])
        self.unconsumed = 0
        self.ear = self.ears[self.ear is self.ears[0]]
        self.interrupts.set_trigger(INTX, 0, [self.ear.fd])
        self.interrupts.unmask(INTX, 0, [True])
        self.serviced = False

    @rule(disabled=st.booleans())
    def the_driver_writes_intx_disable(self, disabled: bool) -> None:
        if not disabled and self.disabled:
            # Enabling unmasks, so a trigger that is waiting would be doubled: the driver's interrupt was
            # serviced before.
            self.unconsumed = 0
            self.serviced = False
        self.disabled = disabled
        self.interrupts.line.disable(disabled)

    @invariant()
    def a_high_line_has_a_trigger_or_a_client_at_work(self) -> None:
        self.collect()
        if self.level and not self.disabled:
            assert self.unconsumed or self.serviced

    @invariant()
    def there_are_never_two_triggers(self) -> None:
        self.collect()
        assert self.unconsumed <= 1

    def teardown(self) -> None:
        self.interrupts.unwire_all()
        self.context.__exit__(None, None, None)


TestLikeTheKernel = LikeTheKernel.TestCase
TestWellBehavedClient = WellBehavedClient.TestCase
