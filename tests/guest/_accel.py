"""Whether /dev/kvm runs guests here, found out by booting one."""

from __future__ import annotations

import os
import platform
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.guest._errors import GuestError
from tests.peers.cache import cache_root

_DEVICE = Path("/dev/kvm")


async def choose_accelerator(try_boot: Callable[[], Awaitable[object]]) -> str:
    """The accelerator to use: ``kvm`` where `try_boot` has ever succeeded with it under this host kernel,
    else ``tcg``.

    A device that exists may still run no ordinary kernel, so nothing but a boot tells. The answer is
    remembered in the cache directory, by the host's kernel release and machine.
    """
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return "tcg"
    answer = cache_root() / f"kvm-{platform.release()}"
    if not answer.exists():
        try:
            await try_boot()
        except GuestError as failed:
            verdict = f"tcg\n{failed}"
        else:
            verdict = "kvm\n"
        fresh = answer.with_name(f".{answer.name}-{os.getpid()}")
        fresh.write_text(verdict, encoding="utf-8")
        fresh.rename(answer)
    return answer.read_text(encoding="utf-8").partition("\n")[0]
