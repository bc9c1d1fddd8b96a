"""Debian packages of another release, resolved, verified and unpacked without root and without touching the
host's apt.

Nothing is configured and no maintainer script runs: what comes out is a tree of files whose programs are run
through the tree's own dynamic loader.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from tests.guest._arch import HOST
from tests.guest._errors import RigError
from tests.peers.cache import PeerError
from tests.peers.debian import mirror, run

_KEYRINGS = [
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
]
_STALE_KEYS = re.compile(r"NO_PUBKEY|not signed|Missing key|not available")


class PackageTree:
    """An apt of its own in `home`, knowing the binary packages of `suites` and believing that nothing is
    installed.

    Whatever it downloads is verified against Debian's archive keys. General settings of the host's apt, such
    as proxies, apply; its sources, lists and installed packages are neither read nor changed.
    """

    def __init__(self, home: Path, suites: list[str], architecture: str) -> None:
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise RigError(f"{tool} is missing: the guest rig is assembled from Debian packages")
        keyring = next((path for path in _KEYRINGS if path.is_file()), None)
        if keyring is None:
            raise RigError("Debian's archive keys are missing: run `apt-get install debian-archive-keyring`")
        if '"' in str(home):
            raise RigError(f"apt cannot be configured for a directory of this name: {home}")
        self._home = home
        self._archives = home / "cache/archives"
        for directory in ("lists/partial", "cache/archives/partial", "dpkg", "empty"):
            (home / directory).mkdir(parents=True)
        # Nothing is installed; apt also keeps its locks beside this file.
        (home / "dpkg/status").touch()
        archive = mirror()
        lines = [
            f"deb [arch={architecture} signed-by={keyring}] {archive} {suite} main\n" for suite in suites
        ]
        (home / "sources.list").write_text("".join(lines), encoding="utf-8")
        settings = {
            "Dir::State": home,
            "Dir::State::Lists": home / "lists",
            "Dir::State::status": home / "dpkg/status",
            "Dir::Cache": home / "cache",
            "Dir::Etc::sourcelist": home / "sources.list",
            "Dir::Etc::sourceparts": home / "empty",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": home / "empty",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "APT::Get::List-Cleanup": "false",
            "APT::Keep-Downloaded-Packages": "true",
            # Root could not hand its downloads to apt's unprivileged user inside a private directory.
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        }
        lines = [f'{key} "{value}";\n' for key, value in settings.items()]
        (home / "apt.conf").write_text("".join(lines), encoding="utf-8")
        try:
            # An index that cannot be fetched is an error here, not apt's mere warning.
            self._apt("get", "-o", "APT::Update::Error-Mode=any", "update")
        except PeerError as failed:
            hint = ""
            if _STALE_KEYS.search(str(failed)):
                hint = "\nIf it misses keys, renew them: `apt-get install debian-archive-keyring`"
            raise RigError(f"{failed}{hint}") from failed

    def _apt(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        environment = {"APT_CONFIG": str(self._home / "apt.conf"), "LC_ALL": "C.UTF-8"}
        return run([f"apt-{tool}", "-q", *arguments], cwd=cwd, env=environment)

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
