"""The MSI-X capability's registers and where its structures lie."""

import pytest

from device.function import Bar, IrqKind, MemoryBar
from device.pci.capabilities import Msix
from tests.device.interrupts.listener import listeners
from tests.device.pci.capabilities.functions import a_function, get, put

ENABLE = 1 << 15
FUNCTION_MASK = 1 << 14


def test_it_tells_size_and_places() -> None:
    msix = Msix(5, table_bar=0, table_offset=0x600, pba_bar=4, pba_offset=0x708)
    function = a_function(msix, bars=[Bar(0, 4096), Bar(4, 4096)])
    assert get(function, msix, "CONTROL") == 4
    assert get(function, msix, "TABLE") == 0x600
    assert get(function, msix, "PBA") == 0x708 | 4


def test_software_writes_enable_and_function_mask_alone() -> None:
    msix = Msix(5, table_bar=0, pba_offset=0x800)
    function = a_function(msix, bars=[Bar(0, 4096)])
    put(function, msix, "CONTROL", 0xFFFF)
    assert get(function, msix, "CONTROL") == ENABLE | FUNCTION_MASK | 4


def test_table_and_pba_answer_where_the_capability_says() -> None:
    msix = Msix(2, table_bar=0, table_offset=0x100, pba_bar=4, pba_offset=0x8)
    function = a_function(msix, bars=[Bar(0, 4096), Bar(4, 4096)])
    function.region_write(0, 0x110, b"\x00\x10\xe0\xfe")
    assert function.region_read(0, 0x110, 4) == b"\x00\x10\xe0\xfe"
    assert function.region_read(0, 0x11C, 4) == b"\x01\x00\x00\x00"
    put(function, msix, "CONTROL", ENABLE)
    function.interrupts.signal(1)
    assert function.region_read(4, 0x8, 8) == b"\x02" + bytes(7)


def test_the_function_mask_holds_all_vectors_and_lets_them_go() -> None:
    msix = Msix(3, table_bar=0, pba_offset=0x800)
    function = a_function(msix, bars=[Bar(0, 4096)])
    with listeners(3) as ears:
        function.irq_set_trigger(IrqKind.MSIX, 0, [ear.fd for ear in ears])
        put(function, msix, "CONTROL", ENABLE | FUNCTION_MASK)
        function.interrupts.signal(0)
        function.interrupts.signal(2)
        assert [ear.heard() for ear in ears] == [0, 0, 0]
        assert function.region_read(0, 0x800, 8) == b"\x05" + bytes(7)
        put(function, msix, "CONTROL", ENABLE)
        assert [ear.heard() for ear in ears] == [1, 0, 1]
        assert function.region_read(0, 0x800, 8) == bytes(8)
        function.close()


@pytest.mark.parametrize("vectors", [0, 2049])
def test_a_function_has_1_to_2048_vectors(vectors: int) -> None:
    with pytest.raises(ValueError, match="MSI-X vectors"):
        Msix(vectors, table_bar=0, pba_offset=0x8000)


@pytest.mark.parametrize(("bar", "offset"), [(0, 4), (0, 0x801), (6, 0), (-1, 0)])
def test_structures_lie_on_qwords_of_bars(bar: int, offset: int) -> None:
    with pytest.raises(ValueError, match="qword"):
        Msix(1, table_bar=bar, table_offset=offset, pba_offset=0x800)


def test_structures_must_fit_their_bar() -> None:
    with pytest.raises(ValueError, match="MSI-X PBA"):
        a_function(Msix(3, table_bar=0, pba_bar=1, pba_offset=0), bars=[Bar(0, 4096)])
    with pytest.raises(ValueError, match="BAR 0"):
        a_function(Msix(257, table_bar=0, pba_offset=0x800), bars=[Bar(0, 4096)])


def test_structures_cannot_lie_in_mappable_memory() -> None:
    with pytest.raises(ValueError, match="register BAR"):
        a_function(Msix(3, table_bar=2, pba_offset=0x800), bars=[MemoryBar(2, 4096)])
