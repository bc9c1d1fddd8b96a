"""The kernel proper out of Debian's self-unpacking image."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from tests.guest._errors import RigError

# Offsets in the setup header, from the kernel's Documentation/arch/x86/boot.rst.
_SETUP_SECTS, _MAGIC, _PAYLOAD = 0x1F1, 0x202, 0x248
_SECTOR = 512


def extract_vmlinux(bzimage: Path, out: Path, zstd: list[str]) -> None:
    """Write the ELF kernel inside `bzimage` to `out`; `zstd` is the command that runs zstd.

    QEMU starts such a kernel through its PVH entry, so the guest spends no emulated second on decompression.
    """
    image = bzimage.read_bytes()
    if image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise RigError(f"{bzimage.name} is not a Linux boot image")
    setup_sectors = image[_SETUP_SECTS] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = (setup_sectors + 1) * _SECTOR + offset
    # The payload's last four bytes are the unpacked size, kept there for the kernel's own decompressor.
    payload = image[start : start + length - 4]
    done = subprocess.run([*zstd, "-dc"], input=payload, capture_output=True, check=False)
    if done.returncode or done.stdout[:4] != b"\x7fELF":
        raise RigError(f"no zstd-compressed ELF kernel in {bzimage.name}: {done.stderr.decode()}")
    out.write_bytes(done.stdout)
