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

from tests.guest._arch import ARCHES, HOST, Arch
from tests.guest._errors import RigError
from tests.guest._initramfs import modules_directory, write_initramfs
from tests.guest._kernel import extract_vmlinux
from tests.guest._modules import MODULES, SOURCE_PACKAGE, build_modules
from tests.guest._packages import PackageTree, program_command
from tests.peers.cache import PeerError, cache_root, cached
from tests.peers.debian import run

SUITE = "trixie"
_QEMU_SUITE = f"{SUITE}-backports"
_QEMU_PACKAGES = [arch.qemu_package for arch in ARCHES]
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
_KERNEL_PACKAGE = r"linux-image-6\.12\.[0-9.]+\+deb13-"  # and the flavour
_UNWANTED = [
    "usr/bin/qemu-system-i386",
    "usr/bin/qemu-system-ppc",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
]
_KEPT_UNUSED = 7 * 24 * 3600.0
_KERNEL = "boot/vmlinux"
_LAYOUT = 2  # raise when the same packages shall be arranged in another way
_HERE = Path(__file__).parent
IMAGE_FILES = _HERE / "image"
_IMAGE_MAKERS = [_HERE / name for name in ("_arch.py", "_cpio.py", "_elf.py", "_initramfs.py")]


@dataclass(frozen=True)
class Root:
    """Trees of unpacked packages, and the kernel and initramfs made from them."""

    arch: Arch
    """The guest's architecture."""
    host: Path
    """The tree of this host's own architecture: QEMU, and the tools that tests run beside it."""
    tree: Path
    """The tree of the guest's architecture."""
    image: Path
    versions: dict[str, str]
    """The version of every package in `host`."""

    @property
    def kernel(self) -> Path:
        """The stock kernel, decompressed, so that no guest has to do that under emulation."""
        return self.tree / _KERNEL

    @property
    def kernel_release(self) -> str:
        """What ``uname -r`` says in the guest."""
        return modules_directory(self.tree).name

    @property
    def initramfs(self) -> Path:
        """The guest's whole userland."""
        return self.image / "initramfs.cpio"

    @property
    def qemu_version(self) -> str:
        """QEMU's version as its package has it."""
        return self.versions[self.arch.qemu_package]

    def program(self, name: str) -> list[str]:
        """The beginning of a command line that runs a program of `host`, with the libraries there."""
        return program_command(self.host, name)

    def qemu(self) -> list[str]:
        """The beginning of QEMU's command line; it wants `environment` too."""
        data = [self.host / "usr/share" / name for name in ("qemu", "seabios")]
        return [*self.program(self.arch.qemu), *(part for path in data for part in ("-L", str(path)))]

    @property
    def environment(self) -> dict[str, str]:
        """What QEMU needs in its environment beside the host's own."""
        return {"QEMU_MODULE_DIR": str(self.host / "usr/lib" / HOST.triplet / "qemu")}


def say(line: str) -> None:
    """Tell of what takes a while."""
    sys.stderr.write(f"guest rig: {line}\n")
    sys.stderr.flush()


def sweep(name: str, work: Path) -> None:
    """Remove what killed runs left half made, and what nobody used for a week.

    The caller holds the lock of `name`, so nobody else is at work there.
    """
    abandoned = [path for path in cache_root().glob(f".{name}-*") if path.is_dir() and path != work]
    long_ago = time.time() - _KEPT_UNUSED
    abandoned += [path for path in cache_root().glob(f"{name}-*") if path.stat().st_mtime < long_ago]
    for path in abandoned:
        shutil.rmtree(path, ignore_errors=True)


def _make_tree(work: Path, arch: Arch, host: Path | None) -> None:
    """Fill ``work/tree`` with the packages of a guest; where no `host` has them already, with QEMU and the
    modules of `MODULES` too.
    """
    sweep("guest-root", work)
    started = time.monotonic()
    say(f"fetching Debian's package lists for {arch.debian}")
    apt = work / "apt"
    packages = PackageTree(apt, [SUITE] if host else [SUITE, _QEMU_SUITE], arch.debian)
    kernel = packages.dependency(f"linux-image-{arch.kernel}", _KERNEL_PACKAGE + arch.kernel)
    say(f"downloading {kernel} and {'the tools (some 100 MB)' if host else 'tools and QEMU (some 150 MB)'}")
    if host is None:
        packages.download(*_QEMU_PACKAGES, release=_QEMU_SUITE)
    packages.download(*_TOOL_PACKAGES, release=SUITE)
    packages.download_alone(kernel)
    say("unpacking")
    tree = work / "tree"
    versions = {}
    for stem in packages.unpack(tree):
        name, version, _ = stem.split("_")
        versions[name] = version.replace("%3a", ":")
    shutil.rmtree(apt)
    for unwanted in _UNWANTED:
        path = tree / unwanted
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if host is None:
        _check_qemu(tree)
    release = kernel.removeprefix("linux-image-")
    _unpack_kernel(tree, release, host or tree)
    if host is None:
        say(f"building {' and '.join(MODULES)} from {SOURCE_PACKAGE} (some 200 MB with a compiler)")
        build_modules(work / "modules", SUITE, release, modules_directory(tree) / "updates")
    run([*program_command(host or tree, "depmod"), "-b", tree, release])
    (work / "versions.json").write_text(json.dumps(versions, indent=1), encoding="utf-8")
    say(f"{kernel} is ready after {time.monotonic() - started:.1f} s")


def _check_qemu(tree: Path) -> None:
    """Raise `RigError` if a QEMU of the tree cannot have our cards."""
    for arch in ARCHES:
        offered = run([*program_command(tree, arch.qemu), "-device", "vfio-user-pci,help"])
        if "socket=" not in offered:
            raise RigError(f"{arch.qemu} of {_QEMU_SUITE} has no vfio-user-pci device")


def _unpack_kernel(tree: Path, release: str, host: Path) -> None:
    compressed = tree / f"boot/vmlinuz-{release}"
    if compressed.exists():
        extract_vmlinux(compressed, tree / _KERNEL, program_command(host, "zstd"))
    else:
        (tree / f"boot/vmlinux-{release}").rename(tree / _KERNEL)


def _digest(paths: list[Path]) -> str:
    """A digest of our own files: directories with all that is in them, and files."""
    digest = hashlib.sha256()
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    for path in sorted(files):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _cached_tree(arch: Arch, host: Path | None) -> Path:
    """The directory with the tree of an architecture; `host` is that of this host's, None to make it."""
    packages = [*_TOOL_PACKAGES, _KERNEL_PACKAGE + arch.kernel]
    if host is None:
        packages += [_QEMU_SUITE, *_QEMU_PACKAGES, SOURCE_PACKAGE, *MODULES]
    recipe = [SUITE, arch.debian, *packages, *_UNWANTED, str(_LAYOUT)]
    return used(cached("guest-root", "\n".join(recipe), lambda work: _make_tree(work, arch, host)))


def _cached_image(arch: Arch, made: Path, host: Path) -> Path:
    """The directory with the initramfs made from the cached tree `made`."""

    def make(work: Path) -> None:
        sweep("guest-image", work)
        say(f"making the initramfs of {arch.debian} guests")
        stage = work / "stage"  # here, so that a killed run leaves it where the next one sweeps
        with (work / "initramfs.cpio").open("wb") as out:
            write_initramfs(out, stage, arch, made / "tree", host, IMAGE_FILES)
        shutil.rmtree(stage)
        size = (work / "initramfs.cpio").stat().st_size
        say(f"the initramfs is ready: {size / 1e6:.0f} MB")

    return used(cached("guest-image", f"{made.name}\n{_digest([IMAGE_FILES, *_IMAGE_MAKERS])}", make))


def used(made: Path) -> Path:
    """The same; nobody sweeps it away for a week, nor do we while we make the next thing from it."""
    with suppress(PermissionError):  # somebody else's cache: theirs to keep alive
        os.utime(made)
    return made


def guest_root(arch: Arch = HOST) -> Root:
    """Everything that a guest needs, made on first use (see `Root`) and found in the cache afterwards.

    Two processes may ask at once: one makes it, the other waits. Raises `RigError` with a remedy when the
    host lacks a tool, the network or the right processor.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RigError(f"the guest rig runs on Linux x86-64 only, not {sys.platform} {platform.machine()}")
    try:
        own = _cached_tree(HOST, None)
        host = own / "tree"
        made = own if arch is HOST else _cached_tree(arch, host)
        image = _cached_image(arch, made, host)
    except RigError:
        raise
    except PeerError as failed:
        raise RigError(str(failed)) from failed
    versions = json.loads((own / "versions.json").read_text(encoding="utf-8"))
    return Root(arch=arch, host=host, tree=made / "tree", image=image, versions=versions)
