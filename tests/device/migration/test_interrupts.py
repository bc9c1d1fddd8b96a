"""Interrupts of a function that is stopped, and of one that came from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from device.function import IrqKind
from device.migration.states import DeviceState
from tests.device.interrupts.listener import Listener, listeners
from tests.device.migration.moves import load, move, saved
from tests.device.migration.rig import COMMAND, Rig

S = DeviceState
INTX_DISABLE = 1 << 10


@pytest.fixture
def ears() -> Iterator[list[Listener]]:
    with listeners(3) as made:
        yield made


def test_a_stopped_function_interrupts_nobody_and_makes_up_for_it(source: Rig, ears: list[Listener]) -> None:
    source.function.irq_set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in ears])
    source.migration.set_state(S.STOP)
    for _ in range(3):
        source.function.interrupts.signal(1)
    assert [ear.heard() for ear in ears] == [0, 0, 0]
    assert source.function.region_read(0, 0x3000, 1) == b"\2"
    source.migration.set_state(S.RUNNING)
    assert [ear.heard() for ear in ears] == [0, 1, 0]
    assert source.function.region_read(0, 0x3000, 1) == b"\0"


@pytest.mark.parametrize("way", ["unmask", "rewire", "enable"])
def test_a_stopped_line_stays_silent_whatever_the_client_does(
    source: Rig, ears: list[Listener], way: str
) -> None:
    function = source.function
    function.irq_set_trigger(IrqKind.INTX, 0, [ears[0].fd])
    source.migration.set_state(S.STOP)
    function.interrupts.intx(True)
    if way == "unmask":
        function.irq_mask(IrqKind.INTX, 0, [True])
        function.irq_unmask(IrqKind.INTX, 0, [True])
    elif way == "rewire":
        function.irq_disable(IrqKind.INTX)
        function.irq_set_trigger(IrqKind.INTX, 0, [ears[0].fd])
    else:
        source.configure(COMMAND, 2, INTX_DISABLE)
        source.configure(COMMAND, 2, 0)
    assert ears[0].heard() == 0
    source.migration.set_state(S.RUNNING)
    assert ears[0].heard() == 1


@pytest.mark.parametrize("wired_first", [True, False])
@pytest.mark.parametrize("kind", [IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX])
def test_an_interrupt_that_waited_comes_at_the_other_end(
    source: Rig, target: Rig, ears: list[Listener], kind: IrqKind, wired_first: bool
) -> None:
    if kind is not IrqKind.INTX:
        source.function.irq_set_trigger(kind, 0, [ears[2].fd])
        source.function.irq_mask(kind, 0, [True])
    source.function.interrupts.signal(0)
    stream = saved(source.function)
    if wired_first:
        target.function.irq_set_trigger(kind, 0, [ears[0].fd])
    load(target.function, stream)
    if not wired_first:
        target.function.irq_set_trigger(kind, 0, [ears[0].fd])
    assert ears[0].heard() == 1
    assert ears[2].heard() == 0
    assert not target.function.interrupts.lines.vector_pending(0)


def test_the_clients_masks_stay_with_the_client(source: Rig, target: Rig, ears: list[Listener]) -> None:
    source.function.irq_set_trigger(IrqKind.MSIX, 0, [ears[2].fd])
    source.function.irq_mask(IrqKind.MSIX, 0, [True])
    target.function.irq_set_trigger(IrqKind.MSIX, 0, [ears[0].fd, ears[1].fd])
    target.function.irq_mask(IrqKind.MSIX, 1, [True])
    move(source.function, target.function)
    target.function.interrupts.signal(0)
    target.function.interrupts.signal(1)
    assert [ears[0].heard(), ears[1].heard()] == [1, 0]


def masked(rig: Rig, vector: int) -> bool:
    return bool(rig.function.region_read(0, 0x2000 + 16 * vector + 12, 1)[0])


@pytest.mark.parametrize("wired_first", [True, False])
def test_the_tables_masks_arrive_as_software_wrote_them(
    source: Rig, target: Rig, ears: list[Listener], wired_first: bool
) -> None:
    source.function.irq_set_trigger(IrqKind.MSIX, 0, [ears[2].fd, ears[2].fd])
    source.function.region_write(0, 0x2000 + 12, b"\1\0\0\0")
    stream = saved(source.function)
    fds = [ear.fd for ear in ears]
    if wired_first:
        target.function.irq_set_trigger(IrqKind.MSIX, 0, fds)
    load(target.function, stream)
    if not wired_first:
        target.function.irq_set_trigger(IrqKind.MSIX, 0, fds)
    # the third was masked by power-on alone, and wiring it lifts that as ever
    assert [masked(target, vector) for vector in range(3)] == [True, False, False]
    target.function.irq_set_trigger(IrqKind.MSIX, 0, fds)
    assert not masked(target, 0)


def test_errors_and_requests_are_the_hosts_and_pass(source: Rig, ears: list[Listener]) -> None:
    source.function.irq_set_trigger(IrqKind.REQ, 0, [ears[0].fd])
    source.migration.set_state(S.STOP)
    assert source.function.request_release()
    assert ears[0].heard() == 1
