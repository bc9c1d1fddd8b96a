"""What a guest is started from: QEMU, a kernel and an initramfs, made once from Debian packages and kept in
the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.guest._errors import RigError
from tests.guest._initramfs import write_initramfs
from tests.guest._kernel import extract_vmlinux
from tests.guest._packages import PackageTree
from tests.peers.cache import PeerError, cache_root, cached
from tests.peers.debian import run

_SUITE = "trixie"
_QEMU_SUITE = f"{_SUITE}-backports"
_QEMU_PACKAGES = ["qemu-system-x86"]
_TOOL_PACKAGES = [
    "busybox-static",
    "dash",  # busybox's own shell would run its applets in place of the real tools
    "ethtool",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libgcc-s1",  # iperf3 asks for it when it cancels a thread
    "pciutils",
    "tcpdump",
    "zstd",
]
_KERNEL_META, _KERNEL_PACKAGE = "linux-image-amd64", r"linux-image-6\.12\.[0-9.]+\+deb13-amd64"
_UNWANTED = ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/bin/qemu-system-i386"]
_KEPT_UNUSED = 7 * 24 * 3600.0
_LAYOUT = 1  # raise when the same packages shall be arranged in another way
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_HERE = Path(__file__).parent
_IMAGE_FILES = _HERE / "image"
_IMAGE_MAKERS = [_HERE / name for name in ("_cpio.py", "_initramfs.py")]


@dataclass(frozen=True)
class Root:
    """A tree of unpacked packages, and the kernel and initramfs made from it."""

    tree: Path
    image: Path
    versions: dict[str, str]
    """The version of every package in the tree."""

    @property
    def kernel(self) -> Path:
        """The stock kernel, decompressed, so that no guest has to do that under emulation."""
        return self.tree / "boot/vmlinux"

    @property
    def kernel_compressed(self) -> Path:
        """The stock kernel as Debian ships it, for guests that start it through firmware or a boot loader."""
        return next((self.tree / "boot").glob("vmlinuz-*"))

    @property
    def kernel_release(self) -> str:
        """What ``uname -r`` says in the guest."""
        return self.kernel_compressed.name.removeprefix("vmlinuz-")

    @property
    def initramfs(self) -> Path:
        """The guest's whole userland."""
        return self.image / "initramfs.cpio"

    @property
    def qemu_version(self) -> str:
        """QEMU's version as its package has it."""
        return self.versions["qemu-system-x86"]

    def program(self, name: str) -> list[str]:
        """The beginning of a command line that runs a program of the tree, with the tree's libraries."""
        return _program(self.tree, name)

    def qemu(self) -> list[str]:
        """The beginning of QEMU's command line; it wants `environment` too."""
        data = [self.tree / "usr/share" / name for name in ("qemu", "seabios")]
        return [*self.program("qemu-system-x86_64"), *(part for path in data for part in ("-L", str(path)))]

    @property
    def environment(self) -> dict[str, str]:
        """What QEMU needs in its environment beside the host's own."""
        return {"QEMU_MODULE_DIR": str(self.tree / _LIBRARIES / "qemu")}


def _program(tree: Path, name: str) -> list[str]:
    loader = tree / "usr/lib64/ld-linux-x86-64.so.2"
    for directory in ("usr/bin", "usr/sbin"):
        path = tree / directory / name
        if path.exists():
            return [str(loader), "--library-path", str(tree / _LIBRARIES), "--argv0", name, str(path)]
    raise RigError(f"the guest rig has no program {name!r}")


def _say(line: str) -> None:
    sys.stderr.write(f"guest rig: {line}\n")
    sys.stderr.flush()


def _sweep(name: str, work: Path) -> None:
    """Remove what killed runs left half made, and what nobody used for a week.

    The caller holds the lock of `name`, so nobody else is at work there.
    """
    abandoned = [path for path in cache_root().glob(f".{name}-*") if path.is_dir() and path != work]
    long_ago = time.time() - _KEPT_UNUSED
    abandoned += [path for path in cache_root().glob(f"{name}-*") if path.stat().st_mtime < long_ago]
    for path in abandoned:
        shutil.rmtree(path, ignore_errors=True)


def _make_tree(work: Path) -> None:
    _sweep("guest-root", work)
    started = time.monotonic()
    _say("fetching Debian's package lists")
    apt = work / "apt"
    packages = PackageTree(apt, [_SUITE, _QEMU_SUITE])
    kernel = packages.dependency(_KERNEL_META, _KERNEL_PACKAGE)
    _say(f"downloading QEMU, {kernel} and the tools (some 150 MB)")
    packages.download(*_QEMU_PACKAGES, release=_QEMU_SUITE)
    packages.download(*_TOOL_PACKAGES, release=_SUITE)
    packages.download_alone(kernel)
    _say("unpacking")
    tree = work / "tree"
    versions = {}
    for stem in packages.unpack(tree):
        name, version, _ = stem.split("_")
        versions[name] = version.replace("%3a", ":")
    shutil.rmtree(apt)
    for unwanted in _UNWANTED:
        path = tree / unwanted
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    offered = run([*_program(tree, "qemu-system-x86_64"), "-device", "vfio-user-pci,help"])
    if "socket=" not in offered:
        raise RigError(f"QEMU {versions['qemu-system-x86']} has no vfio-user-pci device")
    release = kernel.removeprefix("linux-image-")
    extract_vmlinux(tree / f"boot/vmlinuz-{release}", tree / "boot/vmlinux", _program(tree, "zstd"))
    run([*_program(tree, "depmod"), "-b", tree, release])
    (work / "versions.json").write_text(json.dumps(versions, indent=1), encoding="utf-8")
    _say(f"QEMU {versions['qemu-system-x86']} is ready after {time.monotonic() - started:.1f} s")


def _digest(paths: list[Path]) -> str:
    """A digest of our own files: directories with all that is in them, and files."""
    digest = hashlib.sha256()
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    for path in sorted(files):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def guest_root() -> Root:
    """Everything that a guest needs, made on first use (see `Root`) and found in the cache afterwards.

    Two processes may ask at once: one makes it, the other waits. Raises `RigError` with a remedy when the
    host lacks a tool, the network or the right processor.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RigError(f"the guest rig runs on Linux x86-64 only, not {sys.platform} {platform.machine()}")
    recipe = [
        _SUITE,
        _QEMU_SUITE,
        *_QEMU_PACKAGES,
        *_TOOL_PACKAGES,
        _KERNEL_PACKAGE,
        *_UNWANTED,
        str(_LAYOUT),
    ]
    try:
        made = cached("guest-root", "\n".join(recipe), _make_tree)
        tree = made / "tree"

        def make_image(work: Path) -> None:
            _sweep("guest-image", work)
            _say("making the guest's initramfs")
            with (work / "initramfs.cpio").open("wb") as out:
                write_initramfs(out, tree, _IMAGE_FILES, lambda name: _program(tree, name))
            size = (work / "initramfs.cpio").stat().st_size
            _say(f"the initramfs is ready: {size / 1e6:.0f} MB")

        image = cached("guest-image", f"{made.name}\n{_digest([_IMAGE_FILES, *_IMAGE_MAKERS])}", make_image)
    except RigError:
        raise
    except PeerError as failed:
        raise RigError(str(failed)) from failed
    for used in (made, image):
        with suppress(PermissionError):  # somebody else's cache: theirs to keep alive
            os.utime(used)
    versions = json.loads((made / "versions.json").read_text(encoding="utf-8"))
    return Root(tree=tree, image=image, versions=versions)
