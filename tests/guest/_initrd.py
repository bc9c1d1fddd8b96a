"""What a guest starts from: its userland, and behind it what the host gives it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import IO

from tests.guest._cpio import CpioWriter
from tests.guest._initramfs import LINKED_DIRECTORIES
from tests.guest._root import Root


def write_initrd(
    out: IO[bytes],
    root: Root,
    trees: Sequence[Path] = (),
    script: str | None = None,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Write it for a guest that runs `script`, or one that has somebody at its console.

    `trees` and `files` are those of `tests.guest.boot`. Raises ValueError for a tree that would take a link's
    place.
    """
    for tree, name in product(trees, LINKED_DIRECTORIES):
        path = tree / name
        if path.is_dir() and not path.is_symlink():  # it would take the link's place
            raise ValueError(f"{path} is a directory; guests have /{name} as a link to usr/{name}")
    with root.initramfs.open("rb") as userland:
        shutil.copyfileobj(userland, out)
    archive = CpioWriter(out)
    for tree in trees:
        archive.tree(tree)
    for directory in ("given", "given/files"):
        archive.directory(directory)
    if script is not None:
        archive.file("given/script", script.encode() + b"\n")
    for name, path in (files or {}).items():
        archive.file(f"given/files/{name}", path.read_bytes())
    archive.close()
    out.flush()
