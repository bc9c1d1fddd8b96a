"""The acts of ``trionic demo``: a client drives a served card through what a driver asks of it, and checks
it.

Each act yields how often it did its thing, and what is worth a remark. What it finds wrong is raised. The
client shares no code with the card: it knows the protocol, PCI and virtio only.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import client
from client.pci import read_config
from client.virtio import NetDriver, Wiring, open_net
from protocol import Command
from protocol.messages import DmaMap
from protocol.vfio import DmaMapFlags, RegionIndex
from trionic.migrating import travel
from trionic.peering import peer
from trionic.rewiring import rewire

__all__ = ["ACTS", "Act", "DemoError", "Done", "Stage"]

# An act that takes longer than this hangs; the slowest takes well below a tenth of it.
PATIENCE_S: Final = 30.0

READS: Final = 10_000
POSTED: Final = 10_000
WINDOWS: Final = 1_000
WINDOW_SIZE: Final = 1 << 16
FRAMES: Final = 50_000
MESSAGE_FRAMES: Final = 500
ROUND_TRIPS: Final = 3
BURST: Final = 64
"""Frames under way at a time: fewer than a receive queue holds, so that none is lost."""
FRAME_SIZE: Final = 1514
IRQCHIP_CHANGES: Final = 100
PEER_RESETS: Final = 20
CONTROL_WRITES: Final = 4
PAGE: Final = 4096

_ETHERTYPE: Final = b"\x88\xb5"
"""IEEE 802 local experimental Ethertype 1."""


class DemoError(Exception):
    """The card did not do what it should."""


@dataclass(frozen=True, slots=True)
class Done:
    """How often an act did its thing, in which unit, and a remark."""

    count: int
    unit: str
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where two cards of the same kind are served, each by a process of its own."""

    card: Path
    spare: Path


@dataclass(frozen=True, slots=True)
class Act:
    """A line of the table."""

    name: str
    play: Callable[[Stage], Awaitable[Done]]


async def _negotiation(stage: Stage) -> Done:
    async with client.connect(stage.card) as session:
        version = session.connection.version
        _check(version is not None, "no version was agreed on")
        assert version is not None
        messages = 2 + len(session.regions) + len(session.irqs)
        kinds = sum(1 for irq in session.irqs if irq.count)
        remark = f"version {version.major}.{version.minor}, {kinds} kinds of interrupts"
        return Done(messages, "messages", remark)


async def _configuration(stage: Stage) -> Done:
    async with client.connect(stage.card) as session:
        config = await read_config(session)
        count = len(config.capabilities)
        _check(count > 0, "the card has no capabilities")
        remark = f"{config.vendor:04x}:{config.device:04x}, class {config.class_code:06x}"
        return Done(count, "capabilities", remark)


async def _registers(stage: Stage) -> Done:
    async with client.connect(stage.card) as session:
        expected = await session.region_read(RegionIndex.CONFIG, 0, 4)
        start = perf_counter()
        for _ in range(READS):
            read = await session.region_read(RegionIndex.CONFIG, 0, 4)
            _check(read == expected, f"a register read {read.hex()} instead of {expected.hex()}")
        each = (perf_counter() - start) / READS
        return Done(READS, "reads", f"{each * 1e6:.1f} us each, one after another")


async def _posted_writes(stage: Stage) -> Done:
    async with client.connect(stage.card) as session:
        for number in range(POSTED):
            await session.post_write(RegionIndex.BAR2, number % PAGE // 4 * 4, number.to_bytes(4, "little"))
        last = (POSTED - 1) % PAGE // 4 * 4
        read = await session.region_read(RegionIndex.BAR2, last, 4)
        _check(int.from_bytes(read, "little") == POSTED - 1, "a posted write was overtaken by a read")
        return Done(POSTED, "writes", "none answered, all in order")


async def _bar_map(stage: Stage) -> Done:
    async with client.connect(stage.card) as session:
        with client.BarMapping(session.regions[RegionIndex.BAR2]) as mapping:
            size = session.regions[RegionIndex.BAR2].size
            pattern = os.urandom(PAGE)
            for offset in range(0, size, PAGE):
                view = mapping.view(offset, PAGE)
                view[:] = pattern
                view.release()
            for offset in range(0, size, size // 16):
                read = await session.region_read(RegionIndex.BAR2, offset, PAGE)
                _check(read == pattern, f"what was stored at {offset:#x} is not there")
            await session.region_write(RegionIndex.BAR2, size - 8, b"by wire!")
            view = mapping.view(size - 8, 8)
            _check(bytes(view) == b"by wire!", "what was written by message is not in the mapping")
            view.release()
            return Done(size // PAGE, "pages", f"{size >> 20} MiB of on-card memory, both ways")


async def _dma_map(stage: Stage) -> Done:
    async with client.connect(stage.card) as session:
        fd = os.memfd_create("demo")
        try:
            os.truncate(fd, WINDOW_SIZE)
            for window in range(WINDOWS):
                await session.dma_map(window * WINDOW_SIZE, WINDOW_SIZE, fd=fd)
            try:
                # Past the session's own records, which know of the window: it is for the server to refuse.
                body = DmaMap(DmaMap.size, DmaMapFlags.READ, 0, 0, WINDOW_SIZE)
                await session.request(Command.DMA_MAP, body, fds=(fd,))
            except client.ServerError:
                pass
            else:
                raise DemoError("a window over another one was taken")
            for window in range(WINDOWS):
                await session.dma_unmap(window * WINDOW_SIZE, WINDOW_SIZE)
        finally:
            os.close(fd)
        return Done(WINDOWS, "windows", "mapped, an overlap refused, unmapped")


async def _packets(stage: Stage, count: int, **options: Any) -> Done:
    async with client.connect(stage.card) as session, open_net(session, **options) as nic:
        start = perf_counter()
        await _send_and_receive(nic, count)
        seconds = perf_counter() - start
        _check(nic.counters.interrupts > 0, "no interrupt came")
        rate = count / seconds
        return Done(
            count, "frames", f"{rate / 1e3:.0f} k/s out and back, {nic.counters.interrupts} interrupts"
        )


async def _msix(stage: Stage) -> Done:
    return await _packets(stage, FRAMES, wiring=Wiring.MSIX)


async def _intx(stage: Stage) -> Done:
    return await _packets(stage, FRAMES, wiring=Wiring.INTX)


async def _irqchips(stage: Stage) -> Done:
    tally = await rewire(stage.card, IRQCHIP_CHANGES)
    _check(tally.sound, f"{tally.lost} frames lost, {tally.doubled} doubled on the way")
    lost, doubled = tally.interrupts_lost, tally.interrupts_doubled
    _check(not (lost or doubled), f"{lost} interrupts lost, {doubled} doubled on the way")
    middle, longest = tally.dark_ms
    remark = (
        f"{tally.signalled} interrupts sent, {tally.delivered} delivered, {tally.repeated} said again for a"
        f" change, {lost} lost, {doubled} doubled; line dark {middle:.1f} ms, {longest:.1f} ms at most"
    )
    return Done(tally.changes, "changes", remark)


async def _messages_alone(stage: Stage) -> Done:
    return await _packets(stage, MESSAGE_FRAMES, shared=False, doorbells="message")


async def _migration(stage: Stage) -> Done:
    journey = await travel(stage.card, stage.spare, ROUND_TRIPS)
    _check(journey.sound, f"{journey.lost} frames lost, {journey.doubled} doubled on the way")
    remark = f"{journey.received} frames meanwhile, none lost; {journey.downtime_ms:.1f} ms without the card"
    return Done(len(journey.moves), "moves", remark)


async def _peer_to_peer(stage: Stage) -> Done:
    tally = await peer(stage.card, stage.spare, PEER_RESETS)
    _check(tally.sound, f"{tally.doubled} frames doubled, {tally.overtaken} overtaken, {tally.lost} lost")
    remark = (
        f"by queues in another card's memory; that card reset {PEER_RESETS} times, {len(tally.errors)} errors"
        f" told, {tally.lost} frames gone with it, none garbled"
    )
    return Done(tally.received, "frames", remark)


async def _reset(stage: Stage) -> Done:
    resets = 10
    async with client.connect(stage.card) as session:
        for _ in range(resets):
            async with open_net(session) as nic:
                await _send_and_receive(nic, BURST)
                await session.reset()
                config = await read_config(session)
                _check(not config.command, "the command register outlived a reset")
    return Done(resets, "resets", "in the middle of traffic; the next driver starts afresh")


async def _reconnect(stage: Stage) -> Done:
    clients = 20
    for _ in range(clients):
        async with client.connect(stage.card) as session:
            _check(not (await read_config(session)).command, "a client left its settings behind")
            async with open_net(session) as nic:
                await _send_and_receive(nic, BURST)
    return Done(clients, "clients", "one after another, each finds a fresh card")


async def _send_and_receive(nic: NetDriver, count: int) -> None:
    """Send ``count`` frames to ourselves through the card's loopback port, and know each one again."""
    _check(nic.mac is not None, "the card has no address")
    assert nic.mac is not None
    head = nic.mac + nic.mac + _ETHERTYPE
    filler = bytes(range(256)) * 6
    for start in range(0, count, BURST):
        frames = [
            (head + number.to_bytes(4, "big") + filler)[:FRAME_SIZE]
            for number in range(start, min(start + BURST, count))
        ]
        await nic.send_all(frames)
        received: list[bytes] = []
        while len(received) < len(frames):
            received += nic.receive_burst()
            if len(received) < len(frames):
                await nic.wait_receivable()
        _check(received == frames, f"frames from {start} on came back changed, lost or out of order")


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DemoError(otherwise)


ACTS: Final = (
    Act("negotiation", _negotiation),
    Act("configuration space", _configuration),
    Act("register reads", _registers),
    Act("posted writes", _posted_writes),
    Act("BAR map", _bar_map),
    Act("DMA map", _dma_map),
    Act("packets with MSI-X", _msix),
    Act("packets with INTx", _intx),
    Act("INTx, changing irqchips", _irqchips),
    Act("packets by message", _messages_alone),
    Act("migration", _migration),
    Act("peer to peer", _peer_to_peer),
    Act("reset", _reset),
    Act("clients come and go", _reconnect),
)
