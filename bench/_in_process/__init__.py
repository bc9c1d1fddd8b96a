"""Measurements from within: a Cython module over device.dma's own functions, made when it is first used."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Final

from bench._servers import GCC
from tests.peers.cache import PeerError, cached
from tests.peers.debian import require_host_package, run

_HERE: Final = Path(__file__).resolve().parent
_TREE: Final = _HERE.parent.parent
_NAME: Final = "windows"

# Beyond those of the other C programs: what a module needs, and what Cython's output would be warned for.
_FLAGS: Final = ["-shared", "-fPIC", "-fwrapv", "-DNDEBUG", "-w"]


def _build(work: Path) -> None:
    require_host_package("gcc", Path("/usr/bin/gcc"))
    include = Path(sysconfig.get_path("include"))
    require_host_package("python3-dev", include / "Python.h")
    unit = work / f"{_NAME}.c"
    source = _HERE / f"{_NAME}.pyx"
    run([sys.executable, "-m", "cython", "-3", "-I", _TREE, "-o", unit, source])
    run([*GCC, *_FLAGS, f"-I{include}", f"-I{_HERE}", "-o", work / f"{_NAME}.so", unit])


def windows() -> ModuleType:
    """The module of `windows.pyx`; other sources, or other classes of device.dma, make another one.

    Raises `PeerError` with a remedy when a tool is missing.
    """
    sources = [_HERE / f"{_NAME}.pyx", _HERE / f"{_NAME}_twin.h", *sorted((_TREE / "device").rglob("*.pxd"))]
    recipe = "\n".join(
        [sys.version, *GCC, *_FLAGS, *(source.read_text(encoding="utf-8") for source in sources)]
    )
    path = cached(f"bench-{_NAME}", recipe, _build) / f"{_NAME}.so"
    found = importlib.util.spec_from_file_location(_NAME, path)
    if found is None or found.loader is None:
        raise PeerError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
