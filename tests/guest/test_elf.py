"""Which libraries the guests' programs ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.guest import RigError, Root
from tests.guest._elf import needed_libraries
from tests.guest._initramfs import library_closure
from tests.peers.debian import run

PROGRAM = Path("/usr/bin/env").read_bytes()


@pytest.mark.parametrize("tool", ["iperf3", "tcpdump", "vdpa"])
def test_a_programs_libraries_are_those_that_its_loader_finds(guest_root: Root, tool: str) -> None:
    loader, library_path, libraries, *_, program = guest_root.program(tool)
    listed = run([loader, "--list", library_path, libraries, program])
    found = {Path(path) for path in re.findall(r"=> (\S+) \(0x", listed)}
    assert len(found) > 1
    assert library_closure(guest_root.host, guest_root.arch, [Path(program)]) == found - {Path(loader)}


def test_a_static_program_asks_for_nothing(guest_root: Root) -> None:
    assert needed_libraries(guest_root.host / "usr/bin/busybox") == []


def test_a_library_that_is_missing_is_named(guest_root: Root, tmp_path: Path) -> None:
    with pytest.raises(RigError, match=r"iperf3 lacks its library lib\S+\.so"):
        library_closure(tmp_path, guest_root.arch, [guest_root.host / "usr/bin/iperf3"])


def test_a_script_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    with pytest.raises(RigError, match="no 64-bit little-endian ELF file"):
        needed_libraries(tmp_path / "script")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.integers(0, 0x400) | st.integers(0, len(PROGRAM) - 1), st.integers(0, 255)),
    length=st.just(len(PROGRAM)) | st.integers(0, len(PROGRAM)),
)
@example(changes={0x27: 0x80}, length=len(PROGRAM))  # where the segments are overflows C's integers
def test_a_broken_program_is_refused_or_read_but_nothing_else(
    tmp_path: Path, changes: dict[int, int], length: int
) -> None:
    image = bytearray(PROGRAM)
    for position, value in changes.items():
        image[position] = value
    broken = tmp_path / "broken"
    broken.write_bytes(image[:length])
    try:
        names = needed_libraries(broken)
    except RigError as refused:
        assert str(broken) in str(refused)
    else:
        assert all(isinstance(name, str) for name in names)
