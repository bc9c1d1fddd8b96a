"""What the rig keeps in its cache, and what it leaves nowhere else."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from tests.guest import RigError, Root
from tests.guest import _root as root_module
from tests.guest._arch import HOST, PPC64
from tests.guest._initramfs import modules_directory
from tests.guest._modules import MODULES


def test_a_tree_that_was_not_used_for_long_is_there_for_what_is_made_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIONIC_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(root_module, "_make_tree", lambda work, arch, host: None)
        own = root_module._cached_tree(HOST, None)
    another = tmp_path / "guest-root-of-an-older-recipe"
    another.mkdir()
    long_ago = time.time() - root_module._KEPT_UNUSED - 1
    for tree in (own, another):
        os.utime(tree, (long_ago, long_ago))

    def no_network(home: Path, suites: list[str], architecture: str) -> None:
        assert architecture == PPC64.debian
        raise RigError("nothing can be fetched")

    monkeypatch.setattr(root_module, "PackageTree", no_network)
    with pytest.raises(RigError, match="nothing can be fetched"):
        root_module.guest_root(PPC64)
    assert own.is_dir()
    assert not another.exists()


def test_an_initramfs_is_made_within_the_cache(
    guest_root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIONIC_CACHE", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    made = root_module._cached_image(guest_root.arch, guest_root.tree.parent, guest_root.host)
    assert sorted(path.name for path in made.iterdir()) == ["initramfs.cpio", "recipe.txt"]
    assert (made / "initramfs.cpio").stat().st_size == guest_root.initramfs.stat().st_size


def test_the_modules_that_debian_leaves_out_are_of_the_guests_kernel(guest_root: Root) -> None:
    built = {
        path.stem: path.read_bytes() for path in (modules_directory(guest_root.tree) / "updates").iterdir()
    }
    assert sorted(built) == sorted(MODULES)
    for module, content in built.items():
        assert f"\0vermagic={guest_root.kernel_release} ".encode() in content, module
        assert b".debug_info" not in content, module
