"""Source packages of another Debian release, from this host's mirror, without touching this host's apt."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.peers.cache import PeerError

_APT_ETC = Path("/etc/apt")
_KEYRINGS = [
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
]


def run(command: Sequence[str | Path], *, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command to its end and return what it printed; a failure quotes it and its last words."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, check=False
        )
    except FileNotFoundError as missing:
        raise PeerError(f"{command[0]} is not installed") from missing
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise PeerError(f"`{shlex.join(map(str, command))}` failed with status {done.returncode}:\n{last}")
    return done.stdout


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """The paragraphs of a deb822 ``.sources`` file, continuation lines joined, keys in lower case."""
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line[:1].isspace():
                fields[key] = f"{fields.get(key, '')} {line.strip()}"
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if fields:
            yield fields


def _configured_uris() -> Iterator[str]:
    """Every archive URI that the host's apt is configured with, in apt's own order of reading."""
    drop_ins = sorted((_APT_ETC / "sources.list.d").glob("*"))
    for path in [_APT_ETC / "sources.list", *drop_ins]:
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".sources":
            for stanza in _stanzas(text):
                if stanza.get("enabled", "yes").lower() not in ("no", "false", "0"):
                    yield from stanza.get("uris", "").split()
        elif path.suffix == ".list":
            for line in text.splitlines():
                match = re.match(r"\s*deb(?:-src)?\s+(?:\[[^]]*\]\s*)?(\S+)", line)
                if match:
                    yield match[1]


def mirror() -> str:
    """The Debian archive to fetch from: ``$TRIONIC_DEBIAN_MIRROR``, or the one in the host's apt sources."""
    chosen = os.environ.get("TRIONIC_DEBIAN_MIRROR")
    if chosen:
        return chosen.rstrip("/")
    for uri in _configured_uris():
        # The security archive and foreign archives have other names; only the main one holds every release.
        if re.fullmatch(r"(https?|ftp|file|mirror\+\w+)://?.*/debian/?", uri):
            return uri.rstrip("/")
    raise PeerError(
        f"no Debian archive among the apt sources in {_APT_ETC}; "
        "name one in TRIONIC_DEBIAN_MIRROR (the URI that has `dists/` below it)"
    )


def _keyring() -> Path:
    for keyring in _KEYRINGS:
        if keyring.is_file():
            return keyring
    raise PeerError("Debian's archive keys are missing: apt-get install debian-archive-keyring")


def apt_environment(
    home: Path, kind: str, suites: Sequence[str], architecture: str | None = None
) -> dict[str, str]:
    """The environment in which apt knows nothing but `suites` of the archive, of the ``deb`` or ``deb-src``
    `kind`, believes that no package is installed, and keeps all that it writes in `home`.

    Whatever it downloads is verified against Debian's archive keys. The host's package lists, sources and
    installed packages are neither read nor changed; its general settings (proxies, for example) do apply.
    """
    # Inline values may not contain a quote; a home with one in its path is refused rather than misread.
    if '"' in str(home):
        raise PeerError(f"apt cannot be configured for a directory of this name: {home}")
    for directory in ("lists/partial", "cache/archives/partial", "dpkg", "empty"):
        (home / directory).mkdir(parents=True, exist_ok=True)
    # Nothing is installed; apt also keeps its locks beside this file.
    (home / "dpkg/status").touch()
    options = f"arch={architecture} " * (architecture is not None) + f"signed-by={_keyring()}"
    archive = mirror()
    sources = home / "sources.list"
    sources.write_text(
        "".join(f"{kind} [{options}] {archive} {suite} main\n" for suite in suites), encoding="utf-8"
    )
    settings = {
        "Dir::State": home,
        "Dir::State::Lists": home / "lists",
        "Dir::State::status": home / "dpkg/status",
        "Dir::Cache": home / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": home / "empty",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": home / "empty",
        "APT::Install-Recommends": "false",
        "APT::Get::List-Cleanup": "false",
        "APT::Keep-Downloaded-Packages": "true",
        # An index that cannot be fetched is an error here, not the warning that apt makes of it by default.
        "APT::Update::Error-Mode": "any",
        # Root could not hand its downloads to apt's unprivileged user inside a private directory.
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
    }
    if architecture is not None:
        settings |= {"APT::Architecture": architecture, "APT::Architectures": architecture}
    config = home / "apt.conf"
    config.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()), encoding="utf-8")
    return {"APT_CONFIG": str(config), "LC_ALL": "C.UTF-8"}


class IsolatedApt:
    """An apt that knows one suite's source packages (see `apt_environment`)."""

    def __init__(self, home: Path, suite: str) -> None:
        self.suite = suite
        self._environment = apt_environment(home, "deb-src", [suite])

    def _apt_get(self, *arguments: str, cwd: Path | None = None) -> str:
        return run(["apt-get", "-q", *arguments], cwd=cwd, env=self._environment)

    def fetch_source(self, package: str, into: Path) -> Path:
        """Download a source package, not yet unpacked; the answer is its ``.dsc`` file inside `into`."""
        into.mkdir(parents=True, exist_ok=True)
        self._apt_get("update")
        self._apt_get("source", "--download-only", "--only-source", f"{package}/{self.suite}", cwd=into)
        descriptions = list(into.glob(f"{package}_*.dsc"))
        if len(descriptions) != 1:
            raise PeerError(f"{package} of {self.suite} came without a single .dsc file: {descriptions}")
        return descriptions[0]


def require_host_package(package: str, present: Path) -> None:
    """Make sure that the file `present`, which `package` brings, exists on this host.

    Installs the package when running as root; an ordinary user gets told the command instead.
    """
    if present.exists():
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PeerError(f"{present} is missing: run `apt-get install {package}` as root, then try again")
    install = ["apt-get", "-q", "-y", "install", "--no-install-recommends", package]
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    try:
        run(install, env=quiet)
    except PeerError:
        # The usual reasons are package lists that are absent or out of date.
        run(["apt-get", "-q", "update"], env=quiet)
        run(install, env=quiet)
    if not present.exists():
        raise PeerError(f"{package} is installed, yet {present} is missing")
