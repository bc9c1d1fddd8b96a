"""Two devices that reach each other's BARs through exports, without a byte of the host's memory."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

import client
from client.container import Container, Entry, Mode, open_container
from client.dma import Arena
from client.dmabuf import BarExport, exported_bar
from client.export_view import ExportView
from client.pci import Command, PciControl, read_config
from client.virtio.net import NetDriver, open_net
from device.errors import DeviceError
from device.revocation import Revocation
from protocol.vfio import RegionIndex
from server import serve
from tests.peers.libvfio_user import LibvfioUser
from tests.server.world import BAR2_SIZE, PAGE, Card
from tests.trionic.command import serving

IOVA = 1 << 32
LENT = 2 << 20


async def decode(session: client.Session, *, on: bool = True) -> None:
    """Let the device answer at its BARs, or stop to."""
    await PciControl(session, await read_config(session)).set_command(Command.MEMORY, on=on)


@asynccontextmanager
async def two_functions(folder: Path) -> AsyncIterator[tuple[tuple[Card, client.Session], ...]]:
    """Two cards of one process, whose functions do DMA when a test says so."""
    cards = [Card("first"), Card("second")]
    paths = [folder / "first.sock", folder / "second.sock"]
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        functions = [(card.function, path) for card, path in zip(cards, paths, strict=True)]
        await nursery.start(serve, functions)
        sessions = [await stack.enter_async_context(client.connect(path)) for path in paths]
        for session in sessions:
            await decode(session)
        yield tuple(zip(cards, sessions, strict=True))
    for card in cards:
        card.function.close()


@pytest.mark.parametrize("mode", Mode)
async def test_two_devices_do_dma_from_bar_to_bar_through_exports(mode: Mode, tmp_path: Path) -> None:
    async with two_functions(tmp_path) as ((first, ours), (second, theirs)), AsyncExitStack() as stack:
        for session, peer in ((ours, theirs), (theirs, ours)):
            export = await stack.enter_async_context(exported_bar(peer, 2))
            container = await stack.enter_async_context(open_container(mode))
            await container.attach(session)
            await container.map(IOVA, export)
        first.function.dma.write(IOVA + 8, b"from the first")
        assert await theirs.region_read(2, 8, 14) == b"from the first"
        second.function.dma.write(IOVA + 8, second.function.dma.read(IOVA + 8, 14))
        second.function.dma.write(IOVA + BAR2_SIZE - 4, b"last")
        assert await ours.region_read(2, BAR2_SIZE - 4, 4) == b"last"
        assert first.function.dma.read(IOVA + 8, 14) == b"from the first"


@pytest.mark.parametrize("mode", Mode)
async def test_a_device_does_no_dma_to_a_bar_that_was_revoked(mode: Mode, tmp_path: Path) -> None:
    async with (
        two_functions(tmp_path) as ((first, ours), (second, theirs)),
        exported_bar(theirs, 2, ((PAGE, PAGE),)) as export,
        open_container(mode) as container,
    ):
        await container.attach(ours)
        entry = await container.map(IOVA, export)
        first.function.dma.write(IOVA, b"before")
        await decode(theirs, on=False)
        with pytest.raises(DeviceError):
            first.function.dma.write(IOVA, b"during")
        await decode(theirs)
        if mode is Mode.IOMMUFD:
            await container.unmap(IOVA, PAGE)
            entry = await container.map(IOVA, export)
        assert entry.present
        assert first.function.dma.read(IOVA, 6) == b"before"
        first.function.dma.write(IOVA, b"after!")
        assert second.function.region_read(2, PAGE, 6) == b"after!"


@asynccontextmanager
async def two_nics(folder: Path, processes: int, revocation: Revocation) -> AsyncIterator[list[Path]]:
    """Network cards on loopback ports, served by one process or by one each."""
    paths = [folder / f"{name}.sock" for name in ("first", "second")]
    options = ("--revocation", revocation.value)
    with ExitStack() as stack:
        if processes == 1:
            sockets = [word for path in paths for word in ("--socket", path)]
            stack.enter_context(serving(*sockets, *options))
        else:
            for path in paths:
                stack.enter_context(serving("--socket", path, *options))
        yield paths


class Lent(Arena):
    """Memory that lies in what another card exports: `entry` is where the device has it."""

    def __init__(self, imported: ExportView, entry: Entry) -> None:
        super().__init__(imported.view, entry.iova)
        self.entry = entry

    @property
    def present(self) -> bool:
        """Whether the device reaches it now."""
        return self.entry.present

    async def wait_gone(self) -> None:
        """Until it does not."""
        await self.entry.wait_gone()


@asynccontextmanager
async def living_in(
    session: client.Session, export: BarExport, container: Container
) -> AsyncIterator[tuple[NetDriver, Lent]]:
    """A driver whose rings and buffers are in what another card exports."""
    await container.attach(session)
    with ExportView(export) as imported:
        entry = await container.map(IOVA, export)
        memory = Lent(imported, entry)
        try:
            async with open_net(session, memory=memory) as nic:
                yield nic, memory
        finally:
            memory.close()


async def exchange(nic: NetDriver, count: int) -> None:
    """Frames go out and come back."""
    assert nic.mac is not None
    for number in range(count):
        frame = nic.mac + nic.mac + b"\x88\xb5" + number.to_bytes(50, "big")
        await nic.send(frame)
        assert await nic.receive() == frame


@pytest.mark.parametrize("revocation", Revocation)
@pytest.mark.parametrize("processes", [1, 2])
async def test_two_cards_live_in_each_others_bars(
    processes: int, revocation: Revocation, tmp_path: Path
) -> None:
    async with two_nics(tmp_path, processes, revocation) as paths, AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(client.connect(path)) for path in paths]
        nics = []
        for session, lender in ((first, second), (second, first)):
            await decode(lender)
            parts = ((0, LENT),)
            export = await stack.enter_async_context(exported_bar(lender, RegionIndex.BAR2, parts))
            container = await stack.enter_async_context(open_container())
            nic, _ = await stack.enter_async_context(living_in(session, export, container))
            nics.append(nic)
        for nic in nics * 2:
            await exchange(nic, 20)


@pytest.mark.parametrize("revocation", Revocation)
@pytest.mark.parametrize("processes", [1, 2])
async def test_a_card_is_told_before_its_peer_is_reset_and_starts_anew_afterwards(
    processes: int, revocation: Revocation, tmp_path: Path
) -> None:
    async with (
        two_nics(tmp_path, processes, revocation) as paths,
        client.connect(paths[0]) as session,
        client.connect(paths[1]) as lender,
    ):
        await decode(lender)
        async with (
            exported_bar(lender, RegionIndex.BAR2, ((0, LENT),)) as export,
            open_container() as container,
            living_in(session, export, container) as (nic, memory),
        ):
            await exchange(nic, 20)
            await lender.reset()
            assert (export.maps, memory.present) == (0, False)
            with pytest.raises(client.DeviceError):
                await nic.receive()
            await decode(lender)
            assert memory.present
            await nic.reset()
            await exchange(nic, 20)


async def test_a_card_lives_in_the_bar_of_one_behind_libvfio_user(
    libvfio_user: LibvfioUser, tmp_path: Path
) -> None:
    paths = [tmp_path / "first.sock", tmp_path / "second.sock"]
    engine = ("--engine", "libvfio-user", "--libvfio-user", libvfio_user.library)
    with serving("--socket", paths[0]), serving("--socket", paths[1], *engine):
        async with (
            client.connect(paths[0]) as session,
            client.connect(paths[1]) as lender,
            exported_bar(lender, RegionIndex.BAR2, ((0, LENT),)) as export,
            open_container() as container,
            living_in(session, export, container) as (nic, memory),
        ):
            await exchange(nic, 20)
            await decode(lender, on=False)
            assert (export.maps, memory.present) == (0, False)
