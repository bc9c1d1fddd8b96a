"""Pages that somebody in this process uses, as the kernel's mediated devices do (drivers/vfio/
vfio_iommu_type1.c, vfio_iommu_type1_pin_pages).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from errno import EACCES, EBUSY, EINVAL, EOVERFLOW, EPERM
from inspect import isawaitable

from client._spans import Spans
from client.container._device import Device
from client.container.backing import PageRef
from client.container.entry import Entry
from client.container.errors import ContainerError
from client.container.limits import PAGE, LockedMemory
from client.container.modes import Rules
from protocol.limits import ADDRESS_SPACE
from protocol.vfio import DmaMapFlags

DmaUnmapCallback = Callable[[int, int], Awaitable[None] | None]
"""Called with the address and size of a mapping that goes: unpin what you have there."""


class PinUser:
    """Who may pin, made by `Container.pin_user`."""

    def __init__(self, dma_unmap: DmaUnmapCallback, device: Device | None) -> None:
        self.dma_unmap = dma_unmap
        self.device = device
        self.pages: Counter[int] = Counter()
        """How often it has pinned each page, by address."""


class Pinning:
    """The pins of one container."""

    def __init__(self, rules: Rules, entries: Spans[Entry], locked: LockedMemory) -> None:
        self.tracking = False
        """Whether it is remembered which pages were pinned."""
        self._held_off = False
        self._rules = rules
        self._entries = entries
        self._locked = locked
        self._users: list[PinUser] = []

    @contextmanager
    def user(self, dma_unmap: DmaUnmapCallback, device: Device | None) -> Iterator[PinUser]:
        """Somebody who pins until the block ends, which unpins what is left."""
        user = PinUser(dma_unmap, device)
        self._users.append(user)
        try:
            yield user
        finally:
            self._users.remove(user)
            for iova, count in user.pages.items():
                for _ in range(count):
                    self._put(iova)
            user.pages.clear()

    def forget(self) -> None:
        """Nobody has pins any more."""
        for user in self._users:
            user.pages.clear()

    @contextmanager
    def hold_off(self) -> Iterator[None]:
        """Mappings are taken away, and perhaps brought back: nobody pins meanwhile."""
        self._held_off = True
        try:
            yield
        finally:
            self._held_off = False

    def pin(self, iova: int, npages: int, flags: DmaMapFlags, user: PinUser) -> list[PageRef]:
        """See `Container.pin`."""
        if npages <= 0:
            raise ContainerError(EINVAL, f"pinning {npages} pages")
        if not self._rules.pins:
            raise ContainerError(EACCES, "this version pins nothing")
        if iova < 0 or iova + npages * PAGE > ADDRESS_SPACE:
            raise ContainerError(EOVERFLOW, f"pinning {npages} pages at {iova:#x}")
        if self._held_off:
            raise ContainerError(EBUSY, "mappings are being changed")
        if user not in self._users:
            raise ContainerError(EINVAL, "nobody could tell who pins to let go")
        if iova % PAGE:
            raise ContainerError(EINVAL, f"no page begins at {iova:#x}")
        pages: list[PageRef] = []
        try:
            for at in range(iova, iova + npages * PAGE, PAGE):
                pages.append(self._get(at, flags))
        except ContainerError:
            for number in range(len(pages)):
                self._put(iova + number * PAGE)
            raise
        user.pages.update(range(iova, iova + npages * PAGE, PAGE))
        if user.device is not None:
            user.device.pins_only = True
        return pages

    def unpin(self, iova: int, npages: int, user: PinUser) -> int:
        """See `Container.unpin`."""
        if npages <= 0:
            raise ContainerError(EINVAL, f"unpinning {npages} pages")
        if not self._rules.pins:
            raise ContainerError(EACCES, "this version pins nothing")
        count = 0
        for at in range(iova, iova + npages * PAGE, PAGE):
            if user.pages[at]:
                user.pages[at] -= 1
                if not user.pages[at]:
                    del user.pages[at]
                self._put(at)
                count += 1
        return count

    def _get(self, iova: int, flags: DmaMapFlags) -> PageRef:
        found = self._entries.find(iova)
        if found is None:
            raise ContainerError(self._rules.not_mapped, f"nothing is mapped at {iova:#x}")
        entry = found[2]
        if not entry.mapped:
            raise ContainerError(EBUSY, f"{iova:#x} is being mapped")
        if entry.flags & flags != flags:
            raise ContainerError(EPERM, f"{iova:#x} is not mapped for {flags!r}")
        page = (iova - entry.iova) // PAGE
        memory = entry.source.memory
        if memory is None:
            raise ContainerError(EINVAL, f"there are no pages at {iova:#x}, but a BAR")
        if not entry.pins.get(page):
            if not self._locked.attached:  # else it counts since it was mapped
                self._locked.check(1)
            self._locked.pinned += 1
            if self.tracking:
                entry.dirty.add(page)
        entry.pins[page] = entry.pins.get(page, 0) + 1
        return PageRef(memory, page * PAGE)

    def _put(self, iova: int) -> None:
        found = self._entries.find(iova)
        assert found is not None, "nothing is unmapped that has pins"
        entry = found[2]
        page = (iova - entry.iova) // PAGE
        entry.pins[page] -= 1
        if not entry.pins[page]:
            del entry.pins[page]
            self._locked.pinned -= 1

    async def call_off(self, entries: Iterable[Entry]) -> None:
        """Ask everybody once to let go of what is in these mappings."""
        for entry in entries:
            for user in tuple(self._users):
                waiting = user.dma_unmap(entry.iova, entry.size)
                if isawaitable(waiting):
                    await waiting
