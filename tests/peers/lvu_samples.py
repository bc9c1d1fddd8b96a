"""libvfio-user's own sample devices, built against the real library: servers that its authors wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.peers.cache import PeerError, cached
from tests.peers.debian import IsolatedApt, require_host_package, run
from tests.peers.libvfio_user import PACKAGE, SUITE, _unpack, libvfio_user

# `lspci` listens nowhere, and `null` ends when its standard input does.
SAMPLES = ("gpio-pci-idio-16", "server")
CFLAGS = ["-std=gnu99", "-O2", "-g", "-D_GNU_SOURCE", "-w"]


def _build(work: Path) -> None:
    require_host_package("gcc", Path("/usr/bin/gcc"))
    require_host_package("libc6-dev", Path("/usr/include/stdlib.h"))
    source = work / "source"
    description = IsolatedApt(work / "apt", SUITE).fetch_source(PACKAGE, work / "download")
    tarballs = list(description.parent.glob(f"{PACKAGE}_*.orig.tar.*[!c]"))
    if len(tarballs) != 1:
        raise PeerError(f"expected one upstream tarball beside {description.name}, found {tarballs}")
    _unpack(tarballs[0], source)
    library = libvfio_user()
    for name in SAMPLES:
        unit = source / "samples" / f"{name}.c"
        flags = [f"-I{source / 'lib'}", *library.compile_flags]
        run(["gcc", *CFLAGS, "-o", work / name, unit, *flags, "-lpthread"])
    for scratch in ("source", "download", "apt"):
        shutil.rmtree(work / scratch)


def sample(name: str) -> Path:
    """A sample's program, made on first use.

    Raises `PeerError` with a remedy when a tool, a package or the network is missing.
    """
    recipe = "\n".join([SUITE, PACKAGE, str(libvfio_user().library), *SAMPLES, *CFLAGS])
    return cached("lvu-samples", recipe, _build) / name
