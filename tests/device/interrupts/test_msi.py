"""MSI vectors and their mask register."""

import pytest

from device.interrupts.controller import Interrupts
from device.interrupts.kinds import IrqKind
from tests.device.interrupts.listener import listeners


def test_each_vector_has_its_mask_bit() -> None:
    interrupts = Interrupts(msi=4)
    interrupts.configure_msi(enabled=True, mask=0b1010)
    assert [interrupts.msi.masked(vector) for vector in range(4)] == [False, True, False, True]


@pytest.mark.parametrize("vector", [0, 3])
def test_a_pending_vector_is_delivered_once_when_its_bit_clears(vector: int) -> None:
    with listeners(4) as ears:
        interrupts = Interrupts(msi=4)
        interrupts.set_trigger(IrqKind.MSI, 0, [ear.fd for ear in ears])
        interrupts.configure_msi(enabled=False, mask=0b1111)
        interrupts.signal(vector)
        interrupts.signal(vector)
        assert interrupts.msi.pending_bits() == 1 << vector
        interrupts.configure_msi(enabled=False, mask=0b0000)
        assert [ear.heard() for ear in ears] == [int(index == vector) for index in range(4)]
        interrupts.unwire_all()


def test_a_vector_masked_by_the_client_waits_too() -> None:
    with listeners(2) as ears:
        interrupts = Interrupts(msi=2)
        interrupts.set_trigger(IrqKind.MSI, 0, [ear.fd for ear in ears])
        interrupts.mask(IrqKind.MSI, 0, [True, False])
        interrupts.signal(0)
        interrupts.signal(1)
        assert [ear.heard() for ear in ears] == [0, 1]
        interrupts.unmask(IrqKind.MSI, 0, [True, True])
        assert [ear.heard() for ear in ears] == [1, 0]
        interrupts.unwire_all()
