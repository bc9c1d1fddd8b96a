"""A client is watched: ours does nothing wrong, and each wrong is seen for what it is."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

import client
from conformance import CLIENT_CHECKS, Outcome, Result, listening, watch
from conformance.watching import LIMITS, watch_socket
from protocol.vfio import RegionIndex
from tests.server import raw
from tests.server.raw import RawClient

PATIENCE_S = 5.0
QUICK_S = 0.05

Script = Callable[[RawClient], Awaitable[None]]


async def watched(
    drive: Callable[[socket.socket], Awaitable[None]], *, patience: float = PATIENCE_S, **options: Any
) -> dict[str, Result]:
    """What was seen of the client that `drive` is."""
    ours, theirs = socket.socketpair()
    seen: dict[str, Result] = {}

    async def look() -> None:
        for result in await watch_socket(ours, patience=patience, **options):
            seen[result.check.id] = result

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            with theirs:
                await drive(theirs)
    return seen


def failed(seen: dict[str, Result]) -> dict[str, str]:
    return {name: result.detail for name, result in seen.items() if result.outcome is Outcome.FAIL}


async def drive_ours(sock: socket.socket) -> None:
    """Everything that our client does."""
    async with client.over_socket(sock) as session:
        await session.region_write(RegionIndex.CONFIG, 4, b"\6\0")
        async with client.dma_memory(session, 1 << 20), client.dma_memory(session, 1 << 16, shared=False):
            for _ in range(2):
                await session.region_read(RegionIndex.BAR4, 0, 200_000)
        await session.region_write(RegionIndex.BAR2, 0, bytes(40_000))
        async with client.msix(session, 4):
            pass
        async with client.intx(session):
            pass
        await session.reset()
        # Answers to the last questions are still on their way.
        await session.region_read(RegionIndex.BAR0, 0, 4)


@pytest.mark.parametrize("twin", [False, True])
async def test_our_client_keeps_every_statement(twin: bool) -> None:
    seen = await watched(drive_ours, destructive=True, limits=replace(LIMITS, twin_socket=twin))
    assert failed(seen) == {}
    silent = {name for name, result in seen.items() if result.outcome is Outcome.NOT_APPLICABLE}
    either = {"client-asked.interleaved"} if twin else {"client-dma.twin"}
    assert silent == either | {
        "client-region.multiple-agreed",
        "client-region.multiple-form",
        "client-set-irqs.booleans",
        "client-set-irqs.maskable",
    }


async def test_a_client_is_watched_at_a_path(tmp_path: Path) -> None:
    path = tmp_path / "watch.sock"
    with listening(path) as listener, trio.fail_after(60):
        assert path.stat().st_mode & 0o777 == 0o600
        results: list[Result] = []

        async def look() -> None:
            results.extend(await watch(listener, patience=PATIENCE_S))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(look)
            async with client.connect(path) as session:
                await session.region_read(RegionIndex.CONFIG, 0, 4)
    assert not path.exists()
    assert [result for result in results if result.outcome is Outcome.FAIL] == []


# each wrong by itself


def request(command: int, payload: bytes = b"", fds: Sequence[int] = (), **fields: Any) -> Script:
    async def script(peer: RawClient) -> None:
        await peer.send(raw.message(command, payload, **fields), fds)
        with trio.move_on_after(QUICK_S):
            while (answer := await peer.receive()) is not None and answer.command != command:
                pass

    return script


def first(data: bytes) -> Script:
    """A client that begins with this."""

    async def script(peer: RawClient) -> None:
        await peer.send(data)
        await peer.receive()

    script.__name__ = "first"
    return script


def memory(length: int = 1 << 16) -> int:
    fd = os.memfd_create("client")
    os.ftruncate(fd, length)
    return fd


def windows(*payloads: bytes, shared: bool = True) -> Script:
    async def script(peer: RawClient) -> None:
        fd = memory()
        try:
            for payload in payloads:
                await peer.send(raw.message(raw.DMA_MAP, payload), [fd] if shared else [])
                while True:
                    answer = await peer.receive()
                    if answer is None or answer.command == raw.DMA_MAP:
                        break
        finally:
            os.close(fd)

    return script


def steps(*scripts: Script) -> Script:
    async def script(peer: RawClient) -> None:
        for each in scripts:
            await each(peer)

    return script


def answers(answer: Callable[[raw.Message], bytes | None], *, shared: bool = True) -> Script:
    """A client with one window that answers the server's questions so; None: with silence."""

    async def script(peer: RawClient) -> None:
        fd = memory()
        try:
            await peer.write(raw.CONFIG, 4, b"\4\0")
            await peer.send(raw.message(raw.DMA_MAP, PAGES), [fd] if shared else [])
            with trio.move_on_after(0.5):
                while (question := await peer.receive()) is not None:
                    if question.flags == 0 and (data := answer(question)) is not None:
                        await peer.send(data)
        finally:
            os.close(fd)

    return script


def reply(question: raw.Message, payload: bytes = b"", flags: int = raw.REPLY, error: int = 0) -> bytes:
    message = raw.message(question.command, payload, message_id=question.message_id, flags=flags)
    return message[:12] + error.to_bytes(4, "little") + message[16:]


def honest(question: raw.Message) -> bytes:
    """What a client has to answer; its memory is all zeros."""
    address, count = question.unpack("QQ") if len(question.payload) >= 16 else (0, 0)
    if question.command in (raw.DMA_READ, raw.DMA_WRITE) and 0x10000 <= address < 0x20000:
        data = bytes(count) if question.command == raw.DMA_READ else b""
        return reply(question, question.payload[:16] + data)
    return reply(question, flags=raw.REPLY | raw.ERROR, error=22)


def unless(
    command: int, other: Callable[[raw.Message], bytes | None]
) -> Callable[[raw.Message], bytes | None]:
    return lambda question: other(question) if question.command == command else honest(question)


def info(argsz: int, *rest: int) -> bytes:
    return struct.pack(f"={1 + len(rest)}I", argsz, *rest)


PAGES = raw.dma(0x10000, 0x10000)

WRONGS: dict[str, Script] = {
    "client-version.first": first(raw.message(raw.GET_INFO, info(16, 0, 0, 0))),
    "client-version.payload": first(raw.message(raw.VERSION, bytes(4) + b"{}")),
    "client-version.kinds": first(raw.version({"max_msg_fds": "8"})),
    "client-version.once": first(raw.version() * 2),
    "client-header.type": request(raw.GET_INFO, info(16, 0, 0, 0), flags=2),
    "client-header.size": request(raw.GET_INFO, info(16)),
    "client-header.reserved": request(raw.GET_INFO, info(16, 0, 0, 0), flags=1 << 20),
    "client-header.own-commands": request(raw.DMA_READ, bytes(16)),
    "client-header.descriptors": request(raw.GET_INFO, info(16, 0, 0, 0), [0] * 9),
    "client-header.replies": request(raw.GET_INFO, info(16, 0, 0, 0), flags=raw.REPLY),
    "client-info.argsz": request(raw.GET_INFO, info(15, 0, 0, 0)),
    "client-info.zero": request(raw.GET_IRQ_INFO, info(16, 0, 0, 1)),
    "client-info.index": request(raw.GET_REGION_INFO, info(32, 0, 9, 0, 0, 0, 0, 0)),
    "client-info.more-room": request(raw.GET_REGION_INFO, info(32, 0, 4, 0, 0, 0, 0, 0)),
    "client-dma-map.argsz": windows(info(40) + PAGES[4:]),
    "client-dma-map.flags": windows(raw.dma(0x10000, 0x10000, flags=4)),
    "client-dma-map.range": windows(raw.dma(0x10000, 0)),
    "client-dma-map.aligned": windows(raw.dma(0x10800, 0x1000)),
    "client-dma-map.overlap": windows(PAGES, raw.dma(0x1F000, 0x1000)),
    "client-dma-map.count": windows(*(raw.dma(page << 12, 0x1000) for page in range(257)), shared=False),
    "client-dma-map.descriptor": request(raw.DMA_MAP, PAGES, [0, 0]),
    "client-dma-map.offset": windows(raw.dma(0x10000, 0x1000, offset=0x1000), shared=False),
    "client-dma-map.covered": windows(raw.dma(0x10000, 0x20000)),
    "client-dma-unmap.argsz": steps(windows(PAGES), request(raw.DMA_UNMAP, info(8, 0) + PAGES[16:])),
    "client-dma-unmap.flags": steps(windows(PAGES), request(raw.DMA_UNMAP, info(24, 8) + PAGES[16:])),
    "client-dma-unmap.exact": request(raw.DMA_UNMAP, info(24, 0) + PAGES[16:]),
    "client-dma-unmap.all": windows(PAGES),
    "client-set-irqs.argsz": request(raw.SET_IRQS, info(20, 0x22, 2, 0, 1) + b"\1"),
    "client-set-irqs.flags": request(raw.SET_IRQS, raw.irqs(0x39, raw.INTX, 0, 1)),
    "client-set-irqs.range": request(raw.SET_IRQS, raw.irqs(0x21, raw.MSIX, 3, 2)),
    "client-set-irqs.descriptors": request(raw.SET_IRQS, raw.irqs(0x24, raw.MSIX, 0, 2), [0]),
    "client-set-irqs.booleans": request(raw.SET_IRQS, raw.irqs(0x22, raw.MSIX, 0, 2, b"\1")),
    "client-set-irqs.maskable": request(raw.SET_IRQS, raw.irqs(0x09, raw.MSIX, 0, 1)),
    "client-region.bounds": request(raw.REGION_READ, raw.access(4096, 0, 1)),
    "client-region.size": request(raw.REGION_READ, raw.access(0, 4, 65537)),
    "client-region.data": request(raw.REGION_WRITE, raw.access(0, 0, 4) + b"x"),
    "client-region.multiple-agreed": request(15, bytes(8)),
    "client-region.multiple-form": request(15, bytes([2]).ljust(8, b"\0") + bytes(24)),
    "client-dma.read": answers(unless(raw.DMA_READ, lambda asked: reply(asked, asked.payload[:16]))),
    "client-dma.read-data": answers(
        unless(raw.DMA_READ, lambda asked: reply(asked, asked.payload[:16] + b"\1" * asked.unpack("QQ")[1]))
    ),
    "client-dma.without-descriptor": answers(
        unless(raw.DMA_READ, lambda asked: reply(asked, asked.payload[:16])), shared=False
    ),
    "client-dma.write": answers(unless(raw.DMA_WRITE, reply)),
    "client-dma.write-data": answers(honest),
    "client-dma.unmapped": answers(lambda asked: reply(asked, asked.payload[:16] + bytes(16))),
    "client-asked.answered": answers(lambda asked: None),
    "client-asked.header-only": answers(lambda asked: reply(asked, b"why", raw.REPLY | raw.ERROR, 22)),
}


async def greet(peer: RawClient) -> None:
    await peer.negotiate()


@pytest.mark.parametrize("name", WRONGS)
async def test_a_wrong_is_named(name: str) -> None:
    script = WRONGS[name]

    async def drive(sock: socket.socket) -> None:
        peer = RawClient(trio.socket.from_stdlib_socket(sock.dup()))
        try:
            if getattr(script, "__name__", "") != "first":
                await greet(peer)
            await script(peer)
        finally:
            peer.close()

    seen = await watched(drive, patience=QUICK_S, destructive=True)
    assert name in failed(seen), failed(seen)


# Statements that a client breaks by going away or by what it does to itself: nothing to see then.
NOT_TO_BE_BROKEN = {"client-info.refusal", "client-asked.interleaved"}
# Needs a client that has a twin socket and answers elsewhere.
OF_TWINS = {"client-dma.twin"}
# Asked later in a session than the scripts go.
OF_LATER = {"client-asked.unknown"}


def test_every_statement_has_a_wrong() -> None:
    assert {check.id for check in CLIENT_CHECKS} - WRONGS.keys() == NOT_TO_BE_BROKEN | OF_TWINS | OF_LATER


async def test_an_unknown_command_that_is_granted_is_a_wrong() -> None:
    async def drive(sock: socket.socket) -> None:
        peer = RawClient(trio.socket.from_stdlib_socket(sock.dup()))
        await greet(peer)
        for _ in range(5):
            await peer.send(raw.message(raw.GET_INFO, info(16, 0, 0, 0)))
            answer = await peer.receive()
            if answer is not None and answer.flags == 0:
                await peer.send(reply(answer))
                await peer.receive()
        peer.close()

    seen = await watched(drive)
    assert "client-asked.unknown" in failed(seen)
