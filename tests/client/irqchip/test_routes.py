from __future__ import annotations

import pytest

from client import ClientError
from client.irqchip import NOWHERE, IntxMode, IntxRoute, root_line


def test_devices_that_all_use_inta_are_spread() -> None:
    assert [root_line(slot, 1) for slot in range(6)] == [0, 1, 2, 3, 0, 1]


def test_the_pins_of_a_device_go_to_four_lines() -> None:
    assert [root_line(2, pin) for pin in range(1, 5)] == [2, 3, 0, 1]


@pytest.mark.parametrize("pin", [0, 5, 255, -1])
def test_a_pin_that_is_none_has_no_line(pin: int) -> None:
    with pytest.raises(ClientError, match=f"interrupt pin {pin}"):
        root_line(0, pin)


@pytest.mark.parametrize("mode", [IntxMode.ENABLED, IntxMode.INVERTED])
def test_a_route_needs_an_input_unless_it_leads_nowhere(mode: IntxMode) -> None:
    with pytest.raises(ClientError, match=f"{mode.value} needs an input"):
        IntxRoute(mode)
    assert IntxRoute(mode, 0).gsi == 0
    assert IntxRoute(IntxMode.DISABLED) == NOWHERE
