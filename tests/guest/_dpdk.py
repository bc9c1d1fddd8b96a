"""DPDK for guests: Debian's, with programs of ours that are compiled against it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from tests.guest import _toolchain
from tests.guest._arch import HOST
from tests.guest._errors import RigError
from tests.guest._initramfs import copy_programs
from tests.guest._packages import PackageTree, find_program
from tests.guest._root import SUITE, say, sweep, used
from tests.guest._toolchain import Toolchain
from tests.peers.cache import cached

DRIVERS: Final = ("bus_pci", "bus_vdev", "mempool_ring", "net_virtio", "vdpa_ifc")
"""The drivers that guests have; DPDK loads those that it is told to, see `loading`."""

_ABI = "25"
_LIBRARIES: Final = f"usr/lib/{HOST.triplet}"
_PACKAGES: Final = ["dpdk-dev", *(f"librte-{name.replace('_', '-')}{_ABI}" for name in DRIVERS)]
_PROGRAMS: Final = ["dpdk-testpmd"]
_SOURCES: Final = [Path(__file__).parent / "programs" / name for name in ("vdpa_backend.c", "dpdk_sleeper.c")]
_LINKED: Final = ["rte_vhost", "rte_ethdev", "rte_mbuf", "rte_mempool", "rte_eal"]
_LAYOUT = 1  # raise when the same packages shall be arranged in another way


def loading(*drivers: str) -> str:
    """DPDK's options that load these of `DRIVERS`."""
    return " ".join(f"-d /{_LIBRARIES}/librte_{name}.so.{_ABI}" for name in drivers)


def _make(work: Path) -> None:
    sweep("guest-dpdk", work)
    say("downloading DPDK and a compiler (some 100 MB)")
    packages = PackageTree(work / "apt", [SUITE], HOST.debian)
    packages.download(*_PACKAGES, *_toolchain.PACKAGES, "libc6-dev", release=SUITE)
    packages.download_alone("libdpdk-dev")  # it would bring what static programs want of every driver
    packages.unpack(work / "packages")
    shutil.rmtree(work / "apt")
    packed, tree = work / "packages", work / "tree"
    programs = [find_program(packed, name) for name in _PROGRAMS]
    libraries = [packed / _LIBRARIES / f"librte_{name}.so.{_ABI}" for name in DRIVERS]
    copy_programs(packed, tree, HOST, [*programs, *libraries])
    toolchain = Toolchain(packed)
    for source in _SOURCES:
        _compile(toolchain, packed, source, tree / "usr/bin" / source.stem)
    copy_programs(packed, tree, HOST, [packed / _LIBRARIES / f"lib{name}.so.{_ABI}" for name in _LINKED])
    (tree / "var").mkdir()
    (tree / "var/run").symlink_to("/run")  # where it keeps its sockets
    shutil.rmtree(packed)
    say("DPDK is ready")


def _compile(toolchain: Toolchain, packed: Path, source: Path, program: Path) -> None:
    """Compile a program against the headers and libraries in `packed`."""
    toolchain.run(
        "gcc-14",
        f"--sysroot={packed}",
        *("-O2", "-Wall", "-Werror"),
        *("-march=corei7", "-include", "rte_config.h"),  # as libdpdk-libs.pc has it
        *(f"-I{packed / directory}/dpdk" for directory in ("usr/include", f"usr/include/{HOST.triplet}")),
        *(source, "-o", program, f"-L{packed / _LIBRARIES}", "-Wl,--as-needed"),
        *(f"-l{name}" for name in _LINKED),
    )
    if not program.exists():
        raise RigError(f"the compiler made no {program.name}")


def dpdk_tree() -> Path:
    """A tree for the option `trees` of guests: ``dpdk-testpmd``, `DRIVERS`, and ``vdpa_backend`` and
    ``dpdk_sleeper``, whose sources are in ``programs``. Made on first use.

    Raises `PeerError` if packages cannot be had or a program cannot be compiled.
    """
    recipe = [SUITE, *_PACKAGES, *_PROGRAMS, *_LINKED, *_toolchain.PACKAGES, str(_LAYOUT)]
    recipe += [source.read_text("utf-8") for source in _SOURCES]
    return used(cached("guest-dpdk", "\n".join(recipe), _make)) / "tree"
