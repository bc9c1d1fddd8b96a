"""The real libvfio-user, as the shared object that Debian would ship if it packaged the library on its own.

Debian has it only inside QEMU's source package, at the revision QEMU was released with: the API of June 2022,
where BAR sizes have 32 bits and ``vfu_setup_device_dma`` takes three arguments.
``python -m tests.peers.libvfio_user`` prints where it lies.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tests.peers.cache import PeerError, cached
from tests.peers.debian import IsolatedApt, require_host_package, run

SUITE = "trixie"
PACKAGE = "qemu"
SUBPROJECT = "subprojects/libvfio-user"
SONAME = "libvfio-user.so.0"
# Assertions stay on, as in Debian's own builds; the library's debug logging is off, as in a release.
CFLAGS = ["-std=gnu99", "-O2", "-g", "-fPIC", "-D_GNU_SOURCE", "-fvisibility=hidden", "-w"]
NOT_BUILT = ["tran_pipe.c"]  # upstream's test transport, off by default


@dataclass(frozen=True)
class LibvfioUser:
    """Where the pieces of one build are."""

    library: Path
    include: Path
    version: str
    """The version of the Debian source package that it came from."""

    @property
    def compile_flags(self) -> list[str]:
        """What gcc needs to build a program against this library that finds it again when it runs."""
        return [f"-I{self.include}", str(self.library), f"-Wl,-rpath,{self.library.parent}"]


def _unpack(tarball: Path, into: Path) -> None:
    """Unpack the library's regular files only, so nothing in the archive can point or write elsewhere."""
    wanted = PurePosixPath(SUBPROJECT).parts
    with tarfile.open(tarball, "r|*") as archive:
        for member in archive:
            below = PurePosixPath(member.name).parts[1:]
            if below[: len(wanted)] != wanted or ".." in below or not member.isfile():
                continue
            content = archive.extractfile(member)
            assert content is not None
            target = into.joinpath(*below[len(wanted) :])
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                shutil.copyfileobj(content, file)


def _build(work: Path) -> None:
    require_host_package("gcc", Path("/usr/bin/gcc"))
    require_host_package("libc6-dev", Path("/usr/include/stdlib.h"))
    json_c = Path("/usr/include/json-c")
    require_host_package("libjson-c-dev", json_c / "json.h")

    source = work / "source"
    description = IsolatedApt(work / "apt", SUITE).fetch_source(PACKAGE, work / "download")
    tarballs = list(description.parent.glob(f"{PACKAGE}_*.orig.tar.*[!c]"))
    if len(tarballs) != 1:
        raise PeerError(f"expected one upstream tarball beside {description.name}, found {tarballs}")
    _unpack(tarballs[0], source)
    units = sorted(path for path in (source / "lib").glob("*.c") if path.name not in NOT_BUILT)
    if not units:
        raise PeerError(f"{tarballs[0].name} has no {SUBPROJECT}/lib any more")

    includes = [f"-I{source / 'include'}", f"-I{source / 'lib'}", f"-I{json_c}"]
    link = ["-shared", f"-Wl,-soname,{SONAME}", "-Wl,-z,defs"]
    run(["gcc", *CFLAGS, *includes, *link, "-o", work / SONAME, *units, "-ljson-c", "-lpthread"])
    (source / "include").rename(work / "include")
    (source / "LICENSE").rename(work / "LICENSE")
    (work / "version.txt").write_text(description.stem.partition("_")[2], encoding="utf-8")
    for scratch in ("source", "download", "apt"):
        shutil.rmtree(work / scratch)


def libvfio_user_under_test() -> LibvfioUser:
    """`libvfio_user`, or what lies in ``$TRIONIC_TEST_LIBVFIO_USER``: libvfio-user.so.0 and include/."""
    chosen = os.environ.get("TRIONIC_TEST_LIBVFIO_USER")
    if not chosen:
        return libvfio_user()
    return LibvfioUser(Path(chosen) / SONAME, Path(chosen) / "include", version="chosen")


def libvfio_user() -> LibvfioUser:
    """The library, made on first use (some 10 s and 50 MB of download) and found in the cache afterwards.

    Raises `PeerError` with a remedy when a tool, a package or the network is missing.
    """
    recipe = "\n".join([SUITE, PACKAGE, SUBPROJECT, SONAME, *CFLAGS, *NOT_BUILT])
    made = cached("libvfio-user", recipe, _build)
    version = (made / "version.txt").read_text(encoding="utf-8")
    return LibvfioUser(library=made / SONAME, include=made / "include", version=version)


if __name__ == "__main__":
    print(libvfio_user().library)  # noqa: T201
