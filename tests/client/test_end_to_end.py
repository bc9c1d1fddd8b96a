"""The client against the project's own server in another process, with the loopback port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

import client
from client.pci import read_config
from client.virtio import NetDriver, RxMode, Wiring, open_net
from client.virtio.config import read_net_config
from client.virtio.features import Feature
from client.virtio.transport import Doorbells
from protocol import Limits
from protocol.vfio import RegionIndex

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30
WIRINGS = pytest.mark.parametrize("wiring", list(Wiring), ids=lambda wiring: wiring.value)


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[tuple[Path, trio.Process]]:
    """A served card; its socket and its process."""
    path = tmp_path / "nic.sock"
    command = [sys.executable, "-m", "trionic", "serve", "--socket", str(path), "--port", "loopback"]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            partial(
                trio.run_process,
                command,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=False,
            )
        )
        try:
            with trio.fail_after(PATIENCE):
                said = b""
                while b"READY=1" not in said:
                    part = await process.stdout.receive_some()
                    assert part, said
                    said += part
                yield path, process
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(tmp_path: Path) -> AsyncIterator[client.Session]:
    async with serving(tmp_path) as (path, _), client.connect(path) as session:
        yield session


async def test_the_card_is_the_one_that_drivers_look_for(tmp_path: Path) -> None:
    async with connected(tmp_path) as session:
        config = await read_config(session)
        assert (config.vendor, config.device) == (0x1AF4, 0x1041)
        assert config.subsystem == (0x8086, 0x001A)
        assert {structure.kind for structure in config.virtio} >= {1, 2, 3, 4}
        assert config.msix is not None
        assert config.msix.vectors == session.irqs[2].count


async def test_reads_are_pipelined(tmp_path: Path) -> None:
    async with connected(tmp_path) as session, trio.open_nursery() as nursery:
        whole = await session.region_read(RegionIndex.CONFIG, 0, 256)

        async def read(offset: int) -> None:
            assert await session.region_read(RegionIndex.CONFIG, offset, 4) == whole[offset : offset + 4]

        for offset in range(0, 64, 4):
            nursery.start_soon(read, offset)


async def test_card_memory_is_the_same_by_mapping_and_by_message(tmp_path: Path) -> None:
    async with connected(tmp_path) as session:
        with client.BarMapping(session.regions[RegionIndex.BAR2]) as memory:
            memory.write(0x1000, 8, 0x1122334455667788)
            data = await session.region_read(RegionIndex.BAR2, 0x1000, 8)
            assert int.from_bytes(data, sys.byteorder) == 0x1122334455667788
            await session.post_write(RegionIndex.BAR2, 0x2000, b"posted!!")
            assert await session.region_read(RegionIndex.BAR2, 0x2000, 8) == b"posted!!"
            assert bytes(memory.view(0x2000, 8)) == b"posted!!"


async def test_a_refusal_is_a_server_error_and_the_session_goes_on(tmp_path: Path) -> None:
    async with connected(tmp_path) as session:
        with pytest.raises(client.ServerError, match="EINVAL"):
            await session.region_read(RegionIndex.CONFIG, 1 << 20, 4)
        assert len(await session.region_read(RegionIndex.CONFIG, 0, 4)) == 4


@WIRINGS
async def test_frames_go_round(tmp_path: Path, wiring: Wiring) -> None:
    async with connected(tmp_path) as session, open_net(session, wiring=wiring) as nic:
        for length in (60, 61, 1514, 1000):
            frame = b"\xff" * 6 + os.urandom(length - 6)
            await nic.send(frame)
            assert await nic.receive() == frame
        await nic.set_rx_mode(RxMode.PROMISCUOUS, True)
        await nic.reset()
        frames = [b"\xff" * 6 + number.to_bytes(4, "big") * 20 for number in range(20_000)]
        got: list[bytes] = []
        sent = nic.send_burst(frames[:128])
        while len(got) < len(frames):
            more = nic.receive_burst()
            got += more
            sent += nic.send_burst(frames[sent : sent + len(more)])
            if not more:
                await nic.wait_receivable()
        assert got == frames
        assert nic.counters.interrupts > 0


@pytest.mark.parametrize("twin", [True, False], ids=["twin socket", "one socket"])
async def test_frames_go_round_in_memory_that_the_card_reaches_by_message_alone(
    tmp_path: Path, twin: bool
) -> None:
    async with (
        serving(tmp_path) as (path, _),
        client.connect(path, limits=Limits(twin_socket=twin)) as session,
        open_net(session, shared=False) as nic,
    ):
        assert len(session.wires) == 1 + twin
        await nic.set_rx_mode(RxMode.PROMISCUOUS, True)
        await go_round(nic, 200)


@pytest.mark.parametrize("doorbells", ["mapped", "message", "eventfd"])
async def test_every_kind_of_doorbell_is_heard(tmp_path: Path, doorbells: Doorbells) -> None:
    async with connected(tmp_path) as session, open_net(session, doorbells=doorbells) as nic:
        await nic.set_rx_mode(RxMode.PROMISCUOUS, True)
        await go_round(nic, 200)
        await nic.reset()
        await go_round(nic, 200)


@WIRINGS
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by message alone"])
async def test_a_card_moves_between_servers_and_no_frame_is_lost(
    tmp_path: Path, wiring: Wiring, shared: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    places = [tmp_path / "one", tmp_path / "other"]
    for place in places:
        place.mkdir()
    async with (
        serving(places[0]) as (first, _),
        serving(places[1]) as (second, _),
        client.connect(first) as source,
        client.connect(second) as target,
        open_net(source, wiring=wiring, shared=shared) as nic,
    ):
        assert Feature.GUEST_ANNOUNCE in nic.features
        await nic.set_rx_mode(RxMode.PROMISCUOUS, True)
        sent = 0
        got: list[bytes] = []
        moved = trio.Event()

        async def send() -> None:
            nonlocal sent
            while not moved.is_set():
                await nic.send(numbered(sent))
                sent += 1
                while sent - len(got) >= 64:  # what a loopback holds is limited, and more would be dropped
                    await trio.lowlevel.checkpoint()

        async def receive() -> None:
            while not (moved.is_set() and len(got) == sent):
                got.append(await nic.receive())

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                nursery.start_soon(send)
                for there in (target, source, target):
                    already = len(got)
                    while len(got) < already + 100:
                        await trio.lowlevel.checkpoint()
                    report = await nic.migrate_to(there)
                    assert report.bytes_stopcopy > 0
                    while (await read_net_config(nic._attachment.transport)).announce:
                        await trio.lowlevel.checkpoint()  # the card asks, and is answered
                moved.set()
        assert got == [numbered(number) for number in range(sent)]
    assert "WARNING" not in capfd.readouterr().err


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "by message alone"])
async def test_the_pages_that_the_card_writes_are_told(tmp_path: Path, shared: bool) -> None:
    async with connected(tmp_path) as session, open_net(session, shared=shared) as nic:
        await nic.set_rx_mode(RxMode.PROMISCUOUS, True)
        log = client.DirtyLog(session)
        page = await log.start()
        assert page == 4096
        iova, size = nic.memory.iova, nic.memory.size
        earlier = set((await log.report(iova, size)).pages())
        await go_round(nic, 1)
        written = set((await log.report(iova, size)).pages())
        later = set((await log.report(iova, size)).pages())  # of the rings, where the card may note something
        content = bytes(nic.memory.view)
        came, went = (iova + match.start() for match in re.finditer(re.escape(numbered(0)), content))
        assert came - came % page in written - earlier - later
        assert went - went % page not in written | earlier | later
        await log.stop()
        with pytest.raises(client.ServerError):
            await log.report(iova, size)


async def test_a_window_tells_its_dirty_pages_when_it_goes(tmp_path: Path) -> None:
    async with connected(tmp_path) as session, open_net(session, shared=False) as nic:
        log = client.DirtyLog(session)
        await log.start()
        await session.dma_map(0x5000, 4096)
        bitmap = await log.unmap(0x5000, 4096)
        assert bitmap.count() == 0
        assert len(session.windows) == 1
        await nic.set_rx_mode(RxMode.PROMISCUOUS, True)
        await nic._attachment.transport.reset()
        bitmap = await log.unmap(nic.memory.iova, nic.memory.size)
        assert 0 < bitmap.count() < 10, "the used ring of the control queue, and its answer"


def numbered(number: int) -> bytes:
    """A broadcast frame that tells its number."""
    return b"\xff" * 6 + number.to_bytes(4, "big") * 20


async def go_round(nic: NetDriver, count: int) -> None:
    """Frames out and back, each before the next."""
    with trio.fail_after(PATIENCE):
        for number in range(count):
            await nic.send(numbered(number))
            assert await nic.receive() == numbered(number)


async def test_one_client_after_another_finds_a_fresh_card(tmp_path: Path) -> None:
    async with serving(tmp_path) as (path, _):
        for _ in range(5):
            async with client.connect(path) as session:
                assert (await read_config(session)).command == 0
                async with open_net(session) as nic:
                    await nic.send(b"\xff" * 60)
                    assert await nic.receive() == b"\xff" * 60


@WIRINGS
async def test_who_waits_hears_that_the_server_died(tmp_path: Path, wiring: Wiring) -> None:
    async with serving(tmp_path) as (path, process):

        async def wait_for_a_frame() -> None:
            async with client.connect(path) as session, open_net(session, wiring=wiring) as nic:
                process.send_signal(signal.SIGKILL)
                await nic.receive()

        with trio.fail_after(PATIENCE), pytest.raises(client.Disconnected):
            await wait_for_a_frame()
