"""SET_IRQS: who may be wired when, and what is refused."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.interrupts.controller import Interrupts
from device.interrupts.kinds import IrqFlags, IrqIndex, IrqKind
from tests.descriptors import open_fds, settled_fds
from tests.device.interrupts.listener import Listener, listeners

EXCLUSIVE = [IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX]
NO_VECTOR = 0xFFFF


@pytest.fixture
def ears() -> Iterator[list[Listener]]:
    with listeners(4) as made:
        yield made


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    made = Interrupts(msi=4, msix=4)
    yield made
    made.unwire_all()


@contextmanager
def refused(error: int) -> Iterator[None]:
    with pytest.raises(DeviceError) as refusal:
        yield
    assert refusal.value.errno == error


def test_the_indexes_are_told_as_vfio_pci_does() -> None:
    flags = IrqFlags
    assert Interrupts(msi=4, msix=7).indexes() == (
        IrqIndex(1, flags.EVENTFD | flags.MASKABLE | flags.AUTOMASKED),
        IrqIndex(4, flags.EVENTFD | flags.MASKABLE | flags.NORESIZE),
        IrqIndex(7, flags.EVENTFD | flags.MASKABLE),
        IrqIndex(1, flags.EVENTFD | flags.NORESIZE),
        IrqIndex(1, flags.EVENTFD | flags.NORESIZE),
    )


def test_what_the_function_does_not_have_counts_zero() -> None:
    indexes = Interrupts(pin=False).indexes()
    assert indexes[:3] == (IrqIndex(0, IrqFlags(0)),) * 3


@pytest.mark.parametrize("second", EXCLUSIVE)
@pytest.mark.parametrize("first", EXCLUSIVE)
def test_one_of_intx_msi_and_msix_is_wired_at_a_time(
    interrupts: Interrupts, ears: list[Listener], first: IrqKind, second: IrqKind
) -> None:
    interrupts.set_trigger(first, 0, [ears[0].fd])
    if first is second:
        interrupts.set_trigger(second, 0, [ears[1].fd])
        return
    with refused(errno.EINVAL):
        interrupts.set_trigger(second, 0, [ears[1].fd])
    assert interrupts.active is first
    interrupts.disable(first)
    interrupts.set_trigger(second, 0, [ears[1].fd])
    assert interrupts.active is second


@pytest.mark.parametrize("kind", EXCLUSIVE)
def test_the_kind_that_is_wired_speaks(interrupts: Interrupts, ears: list[Listener], kind: IrqKind) -> None:
    interrupts.set_trigger(kind, 0, [ears[0].fd])
    interrupts.signal(0)
    assert ears[0].heard() == 1


def test_without_wiring_the_enable_bits_choose_who_would_speak(interrupts: Interrupts) -> None:
    modes = []
    for msi, msix in ((False, False), (True, False), (True, True), (False, True), (False, False)):
        interrupts.configure_msi(enabled=msi, mask=0)
        interrupts.configure_msix(enabled=msix, function_mask=False)
        modes.append(IrqKind(interrupts.lines.mode))
    assert modes == [IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX, IrqKind.MSIX, IrqKind.INTX]


def test_wiring_counts_more_than_enable_bits(interrupts: Interrupts, ears: list[Listener]) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 0, [ears[0].fd])
    interrupts.configure_msix(enabled=False, function_mask=False)
    interrupts.signal(0)
    assert ears[0].heard() == 1


def test_msix_is_active_with_no_vector_plugged_as_qemu_enables_it(
    interrupts: Interrupts, ears: list[Listener]
) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 0, [None])
    assert interrupts.active is IrqKind.MSIX
    with refused(errno.EINVAL):
        interrupts.set_trigger(IrqKind.INTX, 0, [ears[0].fd])


def test_msix_vectors_come_and_go_one_by_one(interrupts: Interrupts, ears: list[Listener]) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 1, [ears[1].fd])
    interrupts.set_trigger(IrqKind.MSIX, 3, [ears[3].fd])
    interrupts.set_trigger(IrqKind.MSIX, 1, [None])
    interrupts.signal(1)
    interrupts.signal(3)
    assert [ear.heard() for ear in ears] == [0, 0, 0, 1]


def test_a_wired_block_of_msi_does_not_grow_but_may_change(
    interrupts: Interrupts, ears: list[Listener]
) -> None:
    interrupts.set_trigger(IrqKind.MSI, 0, [ears[0].fd, ears[1].fd])
    with refused(errno.EINVAL):
        interrupts.set_trigger(IrqKind.MSI, 2, [ears[2].fd])
    interrupts.set_trigger(IrqKind.MSI, 1, [ears[3].fd])
    interrupts.signal(1)
    assert [ear.heard() for ear in ears] == [0, 0, 0, 1]
    interrupts.disable(IrqKind.MSI)
    interrupts.set_trigger(IrqKind.MSI, 0, [ear.fd for ear in ears])


def test_a_pending_bit_of_msix_never_becomes_an_msi(interrupts: Interrupts, ears: list[Listener]) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 0, [None])
    interrupts.signal(2)
    interrupts.disable(IrqKind.MSIX)
    interrupts.set_trigger(IrqKind.MSI, 0, [ear.fd for ear in ears])
    assert [ear.heard() for ear in ears] == [0, 0, 0, 0]


def test_a_vector_that_does_not_exist_interrupts_nobody(interrupts: Interrupts, ears: list[Listener]) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in ears])
    interrupts.signal(NO_VECTOR)
    assert [ear.heard() for ear in ears] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("index", "start", "count"),
    [
        (5, 0, 1),
        (-1, 0, 1),
        (IrqKind.INTX, 1, 1),
        (IrqKind.INTX, 0, 2),
        (IrqKind.MSIX, 4, 1),
        (IrqKind.MSIX, 1, 4),
        (IrqKind.MSIX, 1 << 31, 1 << 2),
        (IrqKind.MSI, 0, 5),
        (IrqKind.ERR, 0, 2),
        (IrqKind.REQ, 1, 1),
        (IrqKind.MSIX, -1, 1),
    ],
)
def test_interrupts_that_do_not_exist_are_einval_everywhere(
    interrupts: Interrupts, index: int, start: int, count: int
) -> None:
    for action in (interrupts.mask, interrupts.unmask, interrupts.trigger):
        with refused(errno.EINVAL):
            action(index, start, [True] * count)
    with refused(errno.EINVAL):
        interrupts.set_trigger(index, start, [None] * count)


def test_wiring_nothing_is_einval(interrupts: Interrupts) -> None:
    with refused(errno.EINVAL):
        interrupts.set_trigger(IrqKind.MSIX, 0, [])


@pytest.mark.parametrize("kind", [*EXCLUSIVE, IrqKind.ERR, IrqKind.REQ])
def test_a_refused_wiring_changes_nothing_and_leaks_nothing(
    interrupts: Interrupts, ears: list[Listener], kind: IrqKind
) -> None:
    read_end, write_end = os.pipe()
    before = settled_fds()
    fds = [ears[0].fd, write_end] if kind in (IrqKind.MSI, IrqKind.MSIX) else [write_end]
    with refused(errno.EINVAL):
        interrupts.set_trigger(kind, 0, fds)
    assert interrupts.active is None
    assert open_fds() == before
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("kind", [*EXCLUSIVE, IrqKind.ERR, IrqKind.REQ])
def test_wiring_rewiring_and_disabling_leaks_nothing(
    interrupts: Interrupts, ears: list[Listener], kind: IrqKind
) -> None:
    before = settled_fds()
    for _ in range(3):
        interrupts.set_trigger(kind, 0, [ears[0].fd])
        interrupts.set_trigger(kind, 0, [ears[1].fd])
    if kind is IrqKind.INTX:
        interrupts.set_unmask_fd(kind, ears[2].fd)
        interrupts.set_unmask_fd(kind, ears[3].fd)
    interrupts.disable(kind)
    assert open_fds() == before


def test_disabling_what_is_not_wired_succeeds_and_changes_nothing(
    interrupts: Interrupts, ears: list[Listener]
) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 0, [ears[0].fd])
    for kind in (IrqKind.INTX, IrqKind.MSI, IrqKind.ERR, IrqKind.REQ):
        interrupts.disable(kind)
    assert interrupts.active is IrqKind.MSIX
    with refused(errno.EINVAL):
        interrupts.disable(5)


@pytest.mark.parametrize("kind", [IrqKind.MSI, IrqKind.MSIX])
def test_the_test_trigger_goes_past_all_masks_to_the_chosen_vectors(
    interrupts: Interrupts, ears: list[Listener], kind: IrqKind
) -> None:
    interrupts.set_trigger(kind, 0, [ears[0].fd, ears[1].fd, None, ears[3].fd])
    interrupts.mask(kind, 0, [True] * 4)
    interrupts.trigger(kind, 0, [True, False, True, True])
    assert [ear.heard() for ear in ears] == [1, 0, 0, 1]


def test_the_test_trigger_of_intx_is_silent_while_disabled(
    interrupts: Interrupts, ears: list[Listener]
) -> None:
    interrupts.set_trigger(IrqKind.INTX, 0, [ears[0].fd])
    interrupts.trigger(IrqKind.INTX, 0, [True])
    interrupts.line.disable(True)
    interrupts.trigger(IrqKind.INTX, 0, [True])
    assert ears[0].heard() == 1


@pytest.mark.parametrize("kind", [*EXCLUSIVE, IrqKind.ERR, IrqKind.REQ])
def test_the_test_trigger_needs_wiring(interrupts: Interrupts, kind: IrqKind) -> None:
    with refused(errno.EINVAL):
        interrupts.trigger(kind, 0, [True])


@pytest.mark.parametrize("kind", [IrqKind.ERR, IrqKind.REQ])
def test_error_and_request_are_raised_beside_any_other_kind(
    interrupts: Interrupts, ears: list[Listener], kind: IrqKind
) -> None:
    assert not interrupts.raise_single(kind)
    interrupts.set_trigger(IrqKind.MSIX, 0, [ears[0].fd])
    interrupts.set_trigger(kind, 0, [ears[1].fd])
    assert interrupts.raise_single(kind)
    interrupts.trigger(kind, 0, [True])
    interrupts.trigger(kind, 0, [False])
    assert ears[1].heard() == 2
    interrupts.set_trigger(kind, 0, [None])
    assert not interrupts.raise_single(kind)


@pytest.mark.parametrize("kind", [IrqKind.ERR, IrqKind.REQ])
def test_error_and_request_cannot_be_masked(interrupts: Interrupts, kind: IrqKind) -> None:
    for action in (interrupts.mask, interrupts.unmask):
        with refused(errno.ENOTTY):
            action(kind, 0, [True])


def test_intx_is_masked_only_while_wired(interrupts: Interrupts, ears: list[Listener]) -> None:
    for action in (interrupts.mask, interrupts.unmask):
        with refused(errno.EINVAL):
            action(IrqKind.INTX, 0, [True])
    with refused(errno.EINVAL):
        interrupts.set_unmask_fd(IrqKind.INTX, ears[0].fd)


def test_only_intx_has_an_eventfd_to_unmask_it(interrupts: Interrupts, ears: list[Listener]) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 0, [ears[0].fd])
    with refused(errno.ENOTTY):
        interrupts.set_unmask_fd(IrqKind.MSIX, ears[1].fd)


def test_a_lost_client_leaves_no_wiring_and_no_mask(interrupts: Interrupts, ears: list[Listener]) -> None:
    interrupts.set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in ears])
    interrupts.set_trigger(IrqKind.REQ, 0, [ears[0].fd])
    interrupts.mask(IrqKind.MSIX, 0, [True] * 4)
    interrupts.unwire_all()
    assert interrupts.active is None
    assert not interrupts.raise_single(IrqKind.REQ)
    interrupts.set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in ears])
    interrupts.signal(3)
    assert [ear.heard() for ear in ears] == [0, 0, 0, 1]


# --- moving: what arrives is told in tests/device/migration


states = st.one_of(
    st.binary(max_size=80),
    st.tuples(
        st.binary(min_size=1, max_size=1),
        st.lists(st.integers(0, 1), min_size=5, max_size=5).map(bytes),
        st.binary(min_size=64, max_size=64),
        st.lists(st.integers(0, 1), min_size=4, max_size=4).map(bytes),
    ).map(b"".join),
)


@given(states)
def test_any_bytes_are_the_state_of_interrupts_or_refused(data: bytes) -> None:
    made = Interrupts(msi=4, msix=4)
    before = made.save()
    try:
        apply = made.stage(data)
    except ValueError:
        assert made.save() == before
        return
    apply()
    assert made.save() == data


def test_a_state_that_interrupts_can_have_is_taken() -> None:
    source, target = Interrupts(msi=4, msix=4), Interrupts(msi=4, msix=4)
    source.configure_msix(enabled=True, function_mask=False)
    source.signal(3)
    source.intx(True)
    source.msix.table.write(16, 8, 0xFEE00000)
    target.stage(source.save())()
    assert target.save() == source.save()
    assert target.lines.vector_pending(3)
    assert target.lines.intx_asserted
