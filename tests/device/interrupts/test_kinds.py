"""The numbers of linux/vfio.h."""

from device.interrupts._lines import MODE_INTX, MODE_MSI, MODE_MSIX
from device.interrupts.kinds import IrqFlags, IrqKind


def test_indexes_are_those_of_vfio() -> None:
    assert [(kind.name, kind.value) for kind in IrqKind] == [
        ("INTX", 0),
        ("MSI", 1),
        ("MSIX", 2),
        ("ERR", 3),
        ("REQ", 4),
    ]


def test_flags_are_those_of_vfio() -> None:
    assert [flag.value for flag in IrqFlags] == [1, 2, 4, 8]


def test_the_lines_count_their_modes_the_same_way() -> None:
    assert (MODE_INTX, MODE_MSI, MODE_MSIX) == (IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX)
