"""Which room may import which: the picture of docs/architecture.md, held against the code."""

import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]

MAY_IMPORT = {
    "device": set(),
    "protocol": set(),
    "firmware": {"device"},
    "server": {"protocol", "device"},
    "client": {"protocol"},
    "conformance": {"protocol"},
    "trionic": {"device", "protocol", "firmware", "server", "client", "conformance"},
}

IMPORT = re.compile(r"^\s*(?:from\s+(\w+)[\w.]*\s+c?import|c?import\s+(\w+))", re.MULTILINE)


def imports(room: str) -> set[str]:
    """The rooms that a room's sources name in their imports."""
    files = [path for ending in ("py", "pyx", "pxd", "pyi") for path in (HOUSE / room).rglob(f"*.{ending}")]
    assert files
    named = {name for path in files for pair in IMPORT.findall(path.read_text("utf-8")) for name in pair}
    return named & (MAY_IMPORT.keys() | {"tests", "bench", "examples", "fuzz"})


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_those_below_it(room: str) -> None:
    assert imports(room) - {room} <= MAY_IMPORT[room]


def test_the_pattern_sees_every_kind_of_import() -> None:
    text = "from device.x import y\n    from firmware import z\nfrom server._d cimport D\nimport client\n"
    assert {name for pair in IMPORT.findall(text) for name in pair if name} == {
        "device",
        "firmware",
        "server",
        "client",
    }
