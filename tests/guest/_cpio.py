"""Initramfs archives in the kernel's ``newc`` format, written without a host tool and without the host's
owners or times.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import IO


class CpioWriter:
    """Appends members to a ``newc`` archive; every member belongs to root and is dated to the epoch."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._ino = 0

    def _member(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._ino += 1
        encoded = name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(mode) else 1
        fields = [self._ino, mode, 0, 0, links, 0, len(content), 0, 0, *device, len(encoded), 0]
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._out.write(header + b"\0" * (-len(header) % 4))
        self._out.write(content + b"\0" * (-len(content) % 4))

    def directory(self, name: str) -> None:
        """Add an empty directory."""
        self._member(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, *, executable: bool = False) -> None:
        """Add a regular file."""
        self._member(name, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._member(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self._member(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def tree(self, source: Path, name: str = "") -> None:
        """Add everything below `source` under `name`, parents before children."""
        for path in sorted(source.rglob("*")):
            member = f"{name}/{path.relative_to(source)}".lstrip("/")
            if path.is_symlink():
                self.symlink(member, str(path.readlink()))
            elif path.is_dir():
                self.directory(member)
            else:
                self.file(member, path.read_bytes(), executable=bool(path.stat().st_mode & 0o111))

    def close(self) -> None:
        """Write the trailer. The underlying file stays open."""
        self._ino = -1
        self._member("TRAILER!!!", 0, b"")
