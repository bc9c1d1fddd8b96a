"""How much may be mapped and pinned: the kernel's limits, and those of what is tried again."""

from __future__ import annotations

import mmap
import re
import resource
from errno import ENOMEM
from pathlib import Path
from typing import Final

from client.container.errors import ContainerError

PAGE: Final = mmap.PAGESIZE
"""Bytes of a page: what is pinned and counted."""

DMA_ENTRY_LIMIT: Final = 65_535
"""Mappings of a container at a time (drivers/vfio/vfio_iommu_type1.c, dma_entry_limit): the kernel's memory
for one is nobody's, so their number is limited.
"""

FIRST_FREE: Final = 1 << 40
"""The first address that a container picks by itself: far from where sessions pick theirs."""

UNPIN_ROUNDS: Final = 10
"""How often whoever has pins in a mapping that goes is asked to let go; the kernel stops the machine then
(vfio_dma_do_unmap).
"""

FAULT_TRIES: Final = 16
"""How often a BAR is faulted in whose mapping changes meanwhile. The kernel tries for ever; whoever toggles
memory decoding that often has no use for DMA there.
"""

REVOKE_TRIES: Final = 3
"""How often a server is asked to let go of a BAR that is about to vanish, before its session is ended, which
takes everything away from it. Each refusal may have taken it seconds, for pins to go.
"""

AT_ONCE: Final = 256
"""Mappings that are taken back, or brought back, at the same time: a server always has something to do, and
tasks that only wait for their turn cost memory.
"""

MAX_DIRTY_REPORT: Final = ((1 << 31) - 1) * PAGE
"""Bytes that one report of dirty pages is about (drivers/vfio/vfio_iommu_type1.c, DIRTY_BITMAP_PAGES_MAX)."""

RLIMIT: Final = -1
"""As much locked memory as this process is allowed."""

_IPC_LOCK: Final = 1 << 14
"""CAP_IPC_LOCK, bit of the effective capabilities."""


def process_limit() -> int | None:
    """Bytes of memory that this process may lock: RLIMIT_MEMLOCK, None if it has CAP_IPC_LOCK or no limit."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text("ascii"), re.MULTILINE)
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    privileged = found is not None and int(found[1], 16) & _IPC_LOCK
    return None if privileged or soft == resource.RLIM_INFINITY else soft


class LockedMemory:
    """Pages that count against the limit (vfio_lock_acct): all that are mapped while a device is attached,
    else those that are pinned. A BAR's are none of them.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = None if limit is None else limit // PAGE
        self.mapped = 0
        """Pages of memory in all mappings."""
        self.pinned = 0
        """Pages that are pinned at least once."""
        self.attached = False

    @property
    def pages(self) -> int:
        """How many count."""
        return self.mapped if self.attached else self.pinned

    def check(self, more: int) -> None:
        """Raises ContainerError(ENOMEM) if so many more would be too many."""
        if self._limit is not None and self.pages + more > self._limit:
            raise ContainerError(ENOMEM, f"{self.pages + more} pages of locked memory of {self._limit}")

    def attach(self) -> None:
        """A first device is attached; raises as `check` does."""
        self.attached = True
        try:
            self.check(0)
        except ContainerError:
            self.attached = False
            raise
