"""QEMU for guests, so that a guest can have a machine of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.guest._initramfs import copy_programs
from tests.guest._packages import find_program
from tests.guest._root import Root, say, sweep, used
from tests.peers.cache import cached

_FILES: Final = ("qemu/pxe-virtio.rom", "qemu/kvmvapic.bin", "seabios/bios-256k.bin")
"""Below ``usr/share``: what boots the machine by its network card."""

_LAYOUT = 1  # raise when the same files shall be arranged in another way


def qemu_tree(root: Root) -> Path:
    """The rig's own QEMU for a guest, as one of the trees of `tests.guest.boot`."""

    def make(work: Path) -> None:
        sweep("guest-qemu", work)
        shared = root.host / "usr/share"
        copy_programs(
            root.host,
            work / "tree",
            root.arch,
            [find_program(root.host, root.arch.qemu)],
            [shared / name for name in _FILES],
        )
        say("QEMU for guests is ready")

    recipe = [root.qemu_version, *_FILES, str(_LAYOUT)]
    return used(cached("guest-qemu", "\n".join(recipe), make)) / "tree"
