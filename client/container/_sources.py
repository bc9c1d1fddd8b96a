"""Where the bytes of a mapping are at the moment, for each kind of backing."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from errno import EAGAIN, EFAULT, EOPNOTSUPP
from typing import Any, Protocol

from client.container.backing import Backing, BarRange, PageMemory
from client.container.errors import ContainerError
from client.container.limits import FAULT_TRIES, PAGE
from client.container.modes import Rules
from client.decoding import MemoryDecoding
from client.dmabuf import Attachment, BarExport, DmaBufError
from client.mapping import MappingError
from client.phys_vec import PhysVec
from protocol.vfio import DmaMapFlags

_WRITE = DmaMapFlags.WRITE


@dataclass(frozen=True, slots=True)
class Reach:
    """Ranges of a file, one after the other, and the same bytes here if this process has them. `generation`
    tells a BAR's mapping from a later one.
    """

    fd: int
    ranges: tuple[PhysVec, ...]
    view: memoryview | None = None
    generation: int = 0
    vanishes: bool = False
    """Whether it is a BAR, of which nobody may keep a window when it goes."""


@dataclass(frozen=True, slots=True)
class ExportListener:
    """An importer of exports (`client.dmabuf.Importer`)."""

    invalidate: Callable[[], Coroutine[Any, Any, None]]
    moved: Callable[[], Coroutine[Any, Any, None]]


class Source(Protocol):
    """Made for one mapping by `source_of`."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def offset(self) -> int:
        """Bytes that are to be a multiple of pages, as the size is."""

    @property
    def pages(self) -> int:
        """Pages of locked memory."""

    @property
    def memory(self) -> PageMemory | None:
        """What can be pinned."""

    @property
    def decoding(self) -> MemoryDecoding | None:
        """Whose follower has to see to it that this is let go of in time."""

    def open(self, listener: ExportListener) -> None:
        """Begin to use it, and hear if its export is revoked; raises ContainerError."""

    def check(self, flags: DmaMapFlags) -> None:
        """Raises ContainerError(EFAULT) for permissions that it can never be reached with."""

    def reach(self, flags: DmaMapFlags) -> Reach:
        """Make it available, and say where it is; raises ContainerError."""

    def current(self, reach: Reach) -> bool:
        """Whether it is still there."""

    def leave(self) -> None:
        """No device uses what was reached any more."""

    def close(self) -> None:
        """Be done with it, after `leave`."""


class _Pages:
    decoding = None

    def __init__(self, memory: PageMemory) -> None:
        self._given = self.memory = memory
        self.size, self.offset = memory.length, memory.offset
        self.pages = memory.length // PAGE

    def open(self, listener: ExportListener) -> None:
        self.memory = self._given.hold()

    def check(self, flags: DmaMapFlags) -> None:
        if _WRITE in flags and not self.memory.writable:
            raise ContainerError(EFAULT, "the memory cannot be written to")

    def reach(self, flags: DmaMapFlags) -> Reach:
        self.check(flags)
        return Reach(self.memory.fd, (PhysVec(self.offset, self.size),), self.memory.view)

    def current(self, reach: Reach) -> bool:
        return True

    def leave(self) -> None:
        pass

    def close(self) -> None:
        self.memory.close()


class _Mapped:
    """A BAR by its mapping (drivers/vfio/vfio_iommu_type1.c, follow_fault_pfn): it is faulted in, and looked
    up again if it went away meanwhile.
    """

    pages = 0
    memory = None

    def __init__(self, bar: BarRange, rules: Rules) -> None:
        self._bar = bar
        self._mapping = bar.mapping
        self._pinnable = rules.takes_mappings
        self._view: memoryview | None = None
        self.size, self.offset = bar.length, bar.offset
        self.decoding = bar.mapping.decoding

    def open(self, listener: ExportListener) -> None:
        if not self._pinnable:
            raise ContainerError(EFAULT, "a BAR's mapping has no pages")

    def check(self, flags: DmaMapFlags) -> None:
        if _WRITE in flags and not self._mapping.writable:
            raise ContainerError(EFAULT, "the BAR cannot be written to")

    def reach(self, flags: DmaMapFlags) -> Reach:
        self.check(flags)
        mapping, offset, length = self._mapping, self._bar.offset, self._bar.length
        for _ in range(FAULT_TRIES):
            generation = mapping.generation
            try:
                mapping.fault(offset, length)
                ranges = mapping.translate(offset, length)
                self._view = self._view or mapping.view(offset, length)
            except MappingError as error:
                if mapping.generation == generation:
                    raise ContainerError(error.errno, str(error)) from None
                continue
            if mapping.generation == generation:
                return Reach(mapping.fd, ranges, self._view, generation, vanishes=True)
        raise ContainerError(EAGAIN, "the BAR's mapping changes all the time")

    def current(self, reach: Reach) -> bool:
        return reach.generation == self._mapping.generation and reach.fd == self._mapping.fd

    def leave(self) -> None:
        if self._view is not None:
            self._view.release()
            self._view = None

    def close(self) -> None:
        pass


class _Exported:
    """A BAR by its export. This process has no mapping of its bytes, so no server reaches it by message."""

    pages = 0
    memory = None
    offset = 0
    decoding = None

    def __init__(self, export: BarExport, rules: Rules) -> None:
        if rules.one_range and len(export.ranges) != 1:
            raise ContainerError(EOPNOTSUPP, f"an export of {len(export.ranges)} ranges")
        self.size = sum(one.len for one in export.ranges)
        self._export = export
        self._attachment: Attachment | None = None
        self._mapped = False

    def open(self, listener: ExportListener) -> None:
        try:
            self._attachment = self._export.attach(listener)
        except DmaBufError as error:
            raise ContainerError(error.errno, str(error)) from None

    def check(self, flags: DmaMapFlags) -> None:
        pass

    def reach(self, flags: DmaMapFlags) -> Reach:
        assert self._attachment is not None
        try:
            ranges = self._attachment.map()
        except DmaBufError as error:
            raise ContainerError(error.errno, str(error)) from None
        self._mapped = True
        return Reach(self._export.fd, ranges, vanishes=True)

    def current(self, reach: Reach) -> bool:
        return not self._export.revoked and reach.fd == self._export.fd

    def leave(self) -> None:
        if self._mapped and self._attachment is not None:
            self._mapped = False
            self._attachment.unmap()

    def close(self) -> None:
        if self._attachment is not None:
            self._attachment.detach()
            self._attachment = None


def source_of(backing: Backing, rules: Rules) -> Source:
    """Raises ContainerError(EOPNOTSUPP) for what the mode does not take at all."""
    if isinstance(backing, PageMemory):
        return _Pages(backing)
    if isinstance(backing, BarRange):
        return _Mapped(backing, rules)
    return _Exported(backing, rules)
