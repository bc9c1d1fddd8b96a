"""Power states."""

import pytest

from device.pci.capabilities import PowerManagement
from device.pci.capabilities.pm import D0, D3_HOT
from tests.device.pci.capabilities.functions import a_function, get, put


def test_software_moves_the_function_to_d3hot_and_back() -> None:
    power = PowerManagement()
    function = a_function(power)
    put(function, power, "CONTROL", D3_HOT)
    assert power.power_state == D3_HOT
    put(function, power, "CONTROL", D0)
    assert power.power_state == D0


@pytest.mark.parametrize("state", [1, 2])
@pytest.mark.parametrize("before", [D0, D3_HOT])
def test_a_state_that_the_function_does_not_have_changes_nothing(state: int, before: int) -> None:
    power = PowerManagement()
    function = a_function(power)
    put(function, power, "CONTROL", before)
    put(function, power, "CONTROL", state)
    assert power.power_state == before


def test_the_way_back_keeps_configuration_and_says_so() -> None:
    power = PowerManagement()
    function = a_function(power)
    function.region_write(7, 4, b"\x06\x00")
    decoding = []
    for state in (D0, D3_HOT, D0):
        put(function, power, "CONTROL", state)
        decoding.append(function.memory_enabled)
    assert decoding == [True, False, True]
    assert get(function, power, "CONTROL") == 0x0008


def test_no_power_management_events_are_offered() -> None:
    power = PowerManagement()
    assert get(a_function(power), power, "CAPABILITIES") == 0x0003
