"""A compiler of another Debian release on this host: its packages, unpacked, with every program replaced by a
script that runs it through its own release's dynamic loader. Needs neither root nor a namespace.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.guest._arch import HOST
from tests.peers.debian import run

PACKAGES = ["binutils", "gcc-14", "libelf1t64", "libzstd1"]
"""What it is made from: Debian's compiler of its kernel, and the libraries of the kernel's build tools."""

# Where Debian puts programs: commands, parts of the compiler, and what kernel modules are built with.
_PROGRAMS = ["usr/bin", "usr/libexec/gcc", "usr/lib/linux-kbuild-*"]
_COMMANDS = "usr/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Toolchain:
    """The toolchain unpacked in `tree`, which stays where it is: scripts name its programs by their paths.

    Whoever makes this has unpacked everything that is to be run.
    """

    def __init__(self, tree: Path) -> None:
        self._tree = tree
        loader = [tree / HOST.loader, "--library-path", tree / "usr/lib" / HOST.triplet]
        for program in list(_programs(tree)):
            real = program.with_name(f"{program.name}.elf")
            program.rename(real)
            command = shlex.join([*map(str, loader), "--argv0"])
            program.write_text(f'#!/bin/sh\nexec {command} "$0" {shlex.quote(str(real))} "$@"\n', "utf-8")
            program.chmod(0o755)

    def run(self, *command: str | Path) -> str:
        """Run a command of it, or one of the host's such as ``make``, and return what it prints.

        Raises `PeerError` if it fails.
        """
        return run(command, env={"PATH": f"{self._tree}/{_COMMANDS}", "LC_ALL": "C.UTF-8"})


def _programs(tree: Path) -> Iterator[Path]:
    """The programs of a tree that are linked dynamically."""
    interpreter = f"/{Path(HOST.loader).relative_to('usr')}".encode()
    for directory in (path for pattern in _PROGRAMS for path in tree.glob(pattern)):
        for path in directory.rglob("*"):
            if path.is_symlink() or not path.is_file() or not os.access(path, os.X_OK):
                continue
            with path.open("rb") as file:
                start = file.read(4096)
            if start.startswith(b"\x7fELF") and interpreter in start:
                yield path
