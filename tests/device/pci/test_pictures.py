"""The register maps in docstrings say what the declarations say."""

import inspect
import re

import pytest

from device.pci.capabilities import (
    Capability,
    Msi,
    Msix,
    PciExpress,
    PowerManagement,
    VirtioCapability,
    VirtioNotify,
    VirtioPciCfgAccess,
)
from device.pci.config_space import HEADER_SIZE, ConfigSpace
from device.pci.registers import At

BYTE_WIDTH = 17  # columns of one byte in a picture, its right border included

STRUCTURES: list[tuple[type[Capability] | type[ConfigSpace], int]] = [
    (ConfigSpace, HEADER_SIZE),
    *(
        (kind, kind.SIZE)
        for kind in (
            PowerManagement,
            Msi,
            Msix,
            PciExpress,
            VirtioCapability,
            VirtioNotify,
            VirtioPciCfgAccess,
        )
    ),
]


def drawn(structure: type) -> tuple[dict[int, tuple[str, int]], int]:
    """What the picture shows, offset -> (name, bytes), and how many bytes it covers."""
    registers = {}
    covered = 0
    for line in inspect.cleandoc(structure.__doc__ or "").splitlines():
        row = re.fullmatch(r"\s*([0-9a-f]{2}) \|(.*)\|", line)
        if not row:
            continue
        offset = int(row[1], 16)
        assert offset == covered, f"rows are in order: {line}"
        covered += 4
        position = offset + 4
        for cell in row[2].split("|"):
            size, rest = divmod(len(cell) + 1, BYTE_WIDTH)
            assert rest == 0, f"cells are whole bytes: {line}"
            position -= size
            if cell.strip():
                registers[position] = (cell.strip(), size)
    return registers, covered


def declared(layout: tuple[At, ...]) -> dict[int, tuple[str, int]]:
    return {at.offset: (at.name, at.register.SIZE) for at in layout}


@pytest.mark.parametrize(("structure", "size"), STRUCTURES)
def test_the_picture_is_the_declaration(structure: type[Capability] | type[ConfigSpace], size: int) -> None:
    registers, covered = drawn(structure)
    assert registers == declared(structure.LAYOUT)
    assert covered == size
