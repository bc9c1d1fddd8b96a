"""Kernel modules that Debian's kernel comes without, built from Debian's own source of that kernel."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.guest import _toolchain
from tests.guest._arch import HOST
from tests.guest._errors import RigError
from tests.guest._packages import PackageTree
from tests.guest._toolchain import Toolchain
from tests.peers.debian import require_host_package

SOURCE_PACKAGE = "linux-source-6.12"

MODULES = {
    "ifcvf": ("drivers/vdpa/ifcvf", "CONFIG_IFCVF"),
    "vp_vdpa": ("drivers/vdpa/virtio_pci", "CONFIG_VP_VDPA"),
}
"""Where the kernel's source has each module, and the option that Debian leaves off."""


def build_modules(work: Path, suite: str, release: str, into: Path) -> None:
    """Build `MODULES` for the kernel `release` of `suite` and put them into the directory `into`.

    `work` is a directory that this makes and takes away again. Raises `PeerError` if anything of it fails.
    """
    require_host_package("make", Path("/usr/bin/make"))
    packages = PackageTree(work / "apt", [suite], HOST.debian)
    headers = f"linux-headers-{release}"
    packages.download(*_toolchain.PACKAGES, "xz-utils", release=suite)
    # Alone: the headers depend on the kernel itself, and the source on compilers of many kinds.
    common = packages.dependency(headers, r"linux-headers-.*-common")
    kbuild = packages.dependency(headers, r"linux-kbuild-.*")
    packages.download_alone(headers, common, kbuild, SOURCE_PACKAGE)
    tree = work / "tree"
    packages.unpack(tree)
    toolchain = Toolchain(tree)
    directories = [f"{SOURCE_PACKAGE}/{directory}" for directory, _ in MODULES.values()]
    toolchain.run("tar", "-C", work, "-xf", tree / f"usr/src/{SOURCE_PACKAGE}.tar.xz", *directories)
    source = work / SOURCE_PACKAGE
    build = tree / "usr/src" / headers
    # It names the other half by the path that it has on a system where it is installed.
    (build / "Makefile").write_text(f"include {tree / 'usr/src' / common / 'Makefile'}\n", "utf-8")
    # With it here the build would want a program that writes type information, which no module needs.
    (build / "vmlinux").unlink(missing_ok=True)
    into.mkdir(parents=True)
    for module, (directory, option) in MODULES.items():
        toolchain.run("make", "-C", build, f"M={source / directory}", f"{option}=m", "modules")
        built = source / directory / f"{module}.ko"
        if not built.exists():
            raise RigError(f"{directory} of {SOURCE_PACKAGE} makes no {module}.ko any more")
        toolchain.run("strip", "--strip-debug", built)
        shutil.copy(built, into)
    shutil.rmtree(work)
