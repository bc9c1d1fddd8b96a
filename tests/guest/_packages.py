"""Debian packages of another release, resolved, verified and unpacked without root and without touching the
host's apt.

Nothing is configured and no maintainer script runs: what comes out is a tree of files whose programs are run
through the tree's own dynamic loader.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from tests.guest._arch import HOST
from tests.guest._errors import RigError
from tests.peers.cache import PeerError
from tests.peers.debian import apt_environment, run

_STALE_KEYS = re.compile(r"NO_PUBKEY|not signed|Missing key|not available")


class PackageTree:
    """An apt of its own in `home`, knowing the binary packages of `suites` (see `apt_environment`)."""

    def __init__(self, home: Path, suites: list[str], architecture: str) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise RigError(f"{tool} is missing: the guest rig is assembled from Debian packages")
        self._archives = home / "cache/archives"
        self._environment = apt_environment(home, "deb", suites, architecture)
        try:
            self._apt("get", "update")
        except PeerError as failed:
            hint = ""
            if _STALE_KEYS.search(str(failed)):
                hint = "\nIf it misses keys, renew them: `apt-get install debian-archive-keyring`"
            raise RigError(f"{failed}{hint}") from failed

    def _apt(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        return run([f"apt-{tool}", "-q", *arguments], cwd=cwd, env=self._environment)

    def download(self, *packages: str, release: str) -> None:
        """Fetch packages with everything they depend on, dependencies from `release` where it has them."""
        self._apt("get", "-y", "--download-only", "-t", release, "install", *packages)

    def download_alone(self, *packages: str) -> None:
        """Fetch packages without their dependencies."""
        self._apt("get", "download", *packages, cwd=self._archives)

    def dependency(self, package: str, pattern: str) -> str:
        """The dependency of `package` whose name matches `pattern`: from a metapackage to the thing."""
        for line in self._apt("cache", "depends", package).splitlines():
            name = line.partition("Depends: ")[2].strip()
            if re.fullmatch(pattern, name):
                return name
        raise RigError(f"{package} no longer depends on anything like {pattern}")

    def unpack(self, root: Path) -> list[str]:
        """Unpack all that was downloaded into `root` and return the list of ``name_version_arch``."""
        packages = sorted(self._archives.glob("*.deb"))
        for directory in ("bin", "lib", "lib64", "sbin"):
            (root / "usr" / directory).mkdir(parents=True, exist_ok=True)
            (root / directory).symlink_to(f"usr/{directory}")
        for package in packages:
            run(["dpkg-deb", "-x", package, root])
        return [package.stem for package in packages]


def find_program(tree: Path, name: str) -> Path:
    """Where a tree of unpacked packages has a program."""
    for directory in ("usr/bin", "usr/sbin"):
        path = tree / directory / name
        if path.exists():
            return path
    raise RigError(f"the guest rig has no program {name!r}")


def program_command(tree: Path, name: str) -> list[str]:
    """The beginning of a command line that runs a program of a tree of this host's architecture."""
    libraries = str(tree / "usr/lib" / HOST.triplet)
    path = str(find_program(tree, name))
    return [str(tree / HOST.loader), "--library-path", libraries, "--argv0", name, path]
