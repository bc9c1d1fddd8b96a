"""DMA memory that lies in a BAR: a device's queues and buffers on another device's card."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from client.container import BarRange, Container, Entry
from client.dma import Arena
from client.mapping import BarMapping, MappingState


class BarMemory(Arena):
    """Made by `bar_memory`. While the BAR's device does not answer `view` reads as ones, what is stored there
    is lost, and no device reaches it.
    """

    def __init__(self, view: memoryview, entry: Entry, mapping: BarMapping) -> None:
        super().__init__(view, entry.iova)
        self.entry = entry
        self._mapping = mapping

    @property
    def present(self) -> bool:
        """Whether devices reach it now, and are to."""
        return self.entry.present and self._mapping.state is MappingState.MAPPED

    async def wait_gone(self) -> None:
        """Until they do not."""
        await self.entry.wait_gone()


@asynccontextmanager
async def bar_memory(
    container: Container,
    mapping: BarMapping,
    *,
    offset: int | None = None,
    size: int | None = None,
    iova: int | None = None,
) -> AsyncIterator[BarMemory]:
    """`size` bytes at `offset` of a BAR (what is mapped of it by default) for all devices of a container,
    until the block ends; whole pages. Nothing is cleared. Raises as `Container.map` and `BarMapping.view` do.
    """
    offset = mapping.offset if offset is None else offset
    size = mapping.offset + mapping.length - offset if size is None else size
    async with container.mapped(iova, BarRange(mapping, offset, size)) as entry:
        memory = BarMemory(mapping.view(offset, size), entry, mapping)
        try:
            yield memory
        finally:
            memory.close()
