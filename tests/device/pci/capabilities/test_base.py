"""The capability list."""

import pytest

from device.function import RegionIndex
from device.pci.capabilities import Msi, PciExpress, PowerManagement
from device.pci.capabilities.base import arrange
from tests.device.pci.capabilities.functions import a_function


def test_capabilities_are_linked_in_the_order_given() -> None:
    function = a_function(PowerManagement(), PciExpress(), Msi())
    config = function.region_read(RegionIndex.CONFIG, 0, 256)
    found = []
    position = config[0x34]
    while position:
        found.append((position, config[position]))
        position = config[position + 1]
    assert found == [(0x40, 0x01), (0x48, 0x10), (0x84, 0x05)]


def test_what_does_not_fit_below_0x100_is_refused() -> None:
    assert arrange([PciExpress(), PciExpress(), PciExpress()]) == [0x40, 0x7C, 0xB8]
    with pytest.raises(ValueError, match="204 bytes of 192"):
        arrange([PciExpress(), PciExpress(), PciExpress(), Msi()])


def test_a_register_is_found_by_name() -> None:
    power = PowerManagement()
    a_function(Msi(), power)
    assert power.at("CONTROL") == 0x40 + Msi.SIZE + 4
    with pytest.raises(KeyError):
        power.at("VOLTAGE")


def test_identifiers_and_links_cannot_be_written() -> None:
    function = a_function(PowerManagement(), Msi())
    before = function.region_read(RegionIndex.CONFIG, 0x40, 2)
    function.region_write(RegionIndex.CONFIG, 0x40, b"\xff\xff")
    assert function.region_read(RegionIndex.CONFIG, 0x40, 2) == before
