"""Registers as declarations."""

import pytest

from device.pci.registers import Access, Register, ro, rw, w1c


class Control(Register, width=16):
    """All kinds of fields."""

    RUN = rw(0)
    MODE = rw(6, 4, reset=5)
    ERROR = w1c(8)
    REVISION = ro(15, 12, reset=3)


def test_masks_come_from_the_fields() -> None:
    assert Control.WRITABLE == 0x0071
    assert Control.WRITE_ONE_CLEAR == 0x0100
    assert Control.RESET == 0x3050
    assert (Control.WIDTH, Control.SIZE) == (16, 2)


def test_fields_know_their_names_and_are_listed_from_the_least_significant() -> None:
    assert [field.name for field in Control.FIELDS] == ["RUN", "MODE", "ERROR", "REVISION"]
    assert Control.ERROR.access is Access.W1C


def test_a_field_is_taken_out_of_a_value_and_put_into_one() -> None:
    assert Control.MODE.get(0x3050) == 5
    assert Control.MODE.put(0xFFFF, 0) == 0xFF8F


def test_a_value_that_does_not_fit_a_field_is_refused() -> None:
    with pytest.raises(ValueError, match="3 bits of MODE"):
        Control.MODE.put(0, 8)


def test_build_starts_from_the_reset_value() -> None:
    assert Control.build(RUN=1) == 0x3051
    assert Control.build(MODE=0, REVISION=0) == 0


def test_build_refuses_a_name_that_is_not_declared() -> None:
    with pytest.raises(AttributeError):
        Control.build(SPEED=1)


def test_describe_names_what_is_set_and_what_is_reserved() -> None:
    assert Control.describe(0x3051) == "0x3051 (RUN, MODE=0x5, REVISION=0x3)"
    assert Control.describe(0x0200) == "0x0200 (reserved=0x200)"
    assert Control.describe(0) == "0x0000"


def test_overlapping_fields_are_refused_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.B"):

        class Wrong(Register, width=8):
            A = rw(3, 0)
            B = rw(5, 3)


def test_a_field_outside_the_width_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.A"):

        class Wrong(Register, width=8):
            A = rw(8)


def test_a_field_cannot_hide_what_every_register_has() -> None:
    with pytest.raises(TypeError, match=r"Wrong\.WIDTH"):

        class Wrong(Register, width=8):
            WIDTH = rw(1)  # type: ignore[assignment]


def test_a_register_is_whole_bytes() -> None:
    with pytest.raises(TypeError, match="12 bits"):

        class Wrong(Register, width=12):
            A = rw(1)
