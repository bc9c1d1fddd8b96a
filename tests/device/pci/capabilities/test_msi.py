"""The MSI capability's registers and what they do to the vectors."""

import pytest

from device.function import IrqKind, PciFunction
from device.pci.capabilities import Msi
from tests.device.interrupts.listener import Listener, listeners
from tests.device.pci.capabilities.functions import a_function, get, put


def wired(msi: Msi, ears: list[Listener]) -> PciFunction:
    function = a_function(msi)
    function.irq_set_trigger(IrqKind.MSI, 0, [ear.fd for ear in ears])
    return function


@pytest.mark.parametrize(("vectors", "control"), [(1, 0x0180), (2, 0x0182), (8, 0x0186), (32, 0x018A)])
def test_the_number_of_vectors_is_a_logarithm(vectors: int, control: int) -> None:
    msi = Msi(vectors)
    assert get(a_function(msi), msi, "CONTROL") == control


@pytest.mark.parametrize("vectors", [0, 3, 64, -1])
def test_other_numbers_of_vectors_are_refused(vectors: int) -> None:
    with pytest.raises(ValueError, match="MSI vectors"):
        Msi(vectors)


def test_only_vectors_that_exist_have_a_mask_bit() -> None:
    msi = Msi(4)
    function = a_function(msi)
    put(function, msi, "MASK", 0xFFFF_FFFF)
    assert get(function, msi, "MASK") == 0xF


def test_a_masked_vector_becomes_pending_and_is_delivered_when_unmasked() -> None:
    msi = Msi(4)
    with listeners(4) as ears:
        function = wired(msi, ears)
        put(function, msi, "MASK", 0b0100)
        function.interrupts.signal(2)
        function.interrupts.signal(2)
        function.interrupts.signal(3)
        assert get(function, msi, "PENDING") == 0b0100
        assert [ear.heard() for ear in ears] == [0, 0, 0, 1]
        put(function, msi, "MASK", 0)
        assert get(function, msi, "PENDING") == 0
        assert [ear.heard() for ear in ears] == [0, 0, 1, 0]
        function.close()


def test_with_fewer_vectors_wired_the_first_speaks_for_the_rest() -> None:
    with listeners(1) as ears:
        function = wired(Msi(4), ears)
        function.interrupts.signal(3)
        assert ears[0].heard() == 1
        function.close()


def test_pending_cannot_be_written() -> None:
    msi = Msi(4)
    function = a_function(msi)
    put(function, msi, "PENDING", 0xF)
    assert get(function, msi, "PENDING") == 0


def test_the_address_is_a_dwords() -> None:
    msi = Msi()
    function = a_function(msi)
    put(function, msi, "ADDRESS", 0xFEE0_0003)
    assert get(function, msi, "ADDRESS") == 0xFEE0_0000
