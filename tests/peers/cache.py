"""Things that are costly to make, kept: each is made once, whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class PeerError(RuntimeError):
    """A peer cannot be made here; the message says what is missing and how to get it."""


def cache_root() -> Path:
    """The cache directory: ``$TRIONIC_CACHE``, or ``.cache`` beside the rooms of the project."""
    chosen = os.environ.get("TRIONIC_CACHE")
    root = Path(chosen).absolute() if chosen else Path(__file__).resolve().parents[2] / ".cache"
    root.mkdir(parents=True, exist_ok=True)
    return root


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """Give the directory that `build` filled for this very `recipe`, filling it now if nobody did before.

    `build` receives an empty directory. It becomes visible under its final name only after `build` returned,
    so an interrupted or failed build leaves nothing behind that a later run could mistake for the real thing.
    Other processes that want the same thing wait meanwhile. Results of other recipes of the same name stay
    where they are: somebody may be running them.
    """
    root = cache_root()
    final = root / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if final.is_dir():
        return final
    with _locked(root / f".{name}.lock"):
        if final.is_dir():
            return final
        work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            build(work)
            (work / "recipe.txt").write_text(recipe, encoding="utf-8")
            work.chmod(0o755)
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final
