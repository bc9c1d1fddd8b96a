"""A small real PCI function behind a real server on a real socket."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from device.dma import DmaWindows
from device.function import Bar, BarKind, Handler, Identity, MemoryBar, PciFunction, ResetKind, Revocation
from device.pci.capabilities import Msi, Msix, PciExpress, PowerManagement
from server import SessionLimits, serve
from tests.descriptors import no_fd_leaks
from tests.server.raw import RawClient, connect

VECTORS = 4
BAR2_SIZE = 8192
PAGE = 4096


@dataclass
class Registers:
    """A register BAR's sub-range that remembers what was written, in order."""

    value: int = 0x12345678
    written: list[tuple[int, int, int]] = field(default_factory=list)
    broken: bool = False
    answers: Callable[[int], int] | None = None

    def read(self, offset: int, count: int) -> int:
        """The value, moved by the offset, or what `answers` has for the offset."""
        if self.broken:
            raise RuntimeError("a mistake in the card's code")
        if self.answers is not None:
            return self.answers(offset)
        return (self.value + offset) & ((1 << 8 * count) - 1)

    def write(self, offset: int, count: int, value: int) -> None:
        """Remember it."""
        if self.broken:
            raise RuntimeError("a mistake in the card's code")
        self.written.append((offset, count, value))


class Card:
    """A function with registers in BAR 0, mappable memory in BAR 2, and every kind of interrupt."""

    def __init__(
        self,
        name: str = "card",
        registers: Handler | None = None,
        dma: DmaWindows | None = None,
        revocation: Revocation = Revocation.COOPERATIVE,
    ) -> None:
        self.registers = Registers()
        bar0 = Bar(0, PAGE)
        bar0.claim(0, 256, registers or self.registers)
        self.memory = MemoryBar(2, BAR2_SIZE, kind=BarKind.MEM64, revocation=revocation)
        self.function = PciFunction(
            name,
            Identity(0x1AF4, 0x1041, 0x8086, 0x001A),
            bars=[bar0, self.memory],
            capabilities=[
                PowerManagement(),
                Msi(),
                Msix(VECTORS, table_bar=0, table_offset=0x400, pba_offset=0x800),
                PciExpress(),
            ],
            dma=dma,
        )
        self.resets: list[ResetKind] = []
        self.function.on_reset = self.resets.append


@dataclass
class World:
    """A card that is served at `path`."""

    path: Path
    card: Card
    function: PciFunction
    clients: AsyncExitStack

    async def connect(self) -> RawClient:
        """A client that has said nothing yet."""
        client = await connect(self.path)
        self.clients.callback(client.close)
        return client

    async def client(self) -> RawClient:
        """A client that has agreed on a version."""
        client = await self.connect()
        (await client.negotiate()).close()
        return client


@asynccontextmanager
async def world(
    tmp_path: Path,
    *,
    limits: SessionLimits | None = None,
    poll_us: int = 0,
    by: Callable[..., Awaitable[None]] = serve,
    card: Card | None = None,
) -> AsyncIterator[World]:
    """Serve a card `by` an engine; at the end the server is cancelled, and no descriptor may be left."""
    path = tmp_path / "card.sock"
    with no_fd_leaks():
        card = card or Card()
        async with AsyncExitStack() as clients, trio.open_nursery() as nursery:

            async def start(task_status: trio.TaskStatus[None]) -> None:
                await by([(card.function, path)], poll_us=poll_us, limits=limits, task_status=task_status)

            await nursery.start(start)
            yield World(path, card, card.function, clients)
            nursery.cancel_scope.cancel()
        card.function.close()
    assert not path.exists()
