"""Checks of the log of pages that the device wrote."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from conformance._features import get, put
from conformance._memory import IOVA, PAGE
from conformance._messages import Message, split
from conformance._peer import Peer
from conformance._server import Server
from conformance.checks import EXTENSION, MUST, SHOULD, NotApplicable, Section, expect
from protocol import Command
from protocol.messages import (
    DeviceFeature,
    DmaLoggingControl,
    DmaLoggingRange,
    DmaLoggingReport,
)
from protocol.vfio import Feature, FeatureFlags

section = Section("dma-logging", "VFIO_DEVICE_FEATURE_DMA_LOGGING_START / STOP / REPORT")

PAGES: Final = 100
"""Of the window: not a multiple of the 64 bits in a word of the bitmap."""
LENGTH: Final = PAGES * PAGE
BITMAP: Final = (PAGES + 63) // 64 * 8


async def _start(peer: Peer, page: int = PAGE, ranges: bytes = b"", count: int | None = None) -> Message:
    told = len(ranges) // DmaLoggingRange.size if count is None else count
    return await put(peer, Feature.DMA_LOGGING_START, DmaLoggingControl(page, told).encode() + ranges)


async def _report(peer: Peer, iova: int = IOVA, length: int = LENGTH, page: int = PAGE) -> Message:
    return await get(peer, Feature.DMA_LOGGING_REPORT, DmaLoggingReport(iova, length, page))


@asynccontextmanager
async def _logging(server: Server) -> AsyncIterator[Peer]:
    """A session with a window; `NotApplicable` where there is no log. The log is stopped at the end."""
    async with server.session() as peer:
        flags = FeatureFlags(FeatureFlags.PROBE | FeatureFlags.SET | Feature.DMA_LOGGING_START)
        if (await peer.ask(Command.DEVICE_FEATURE, DeviceFeature(DeviceFeature.size, flags))).refused:
            raise NotApplicable("the device keeps no log of its writes")
        await peer.mapped(IOVA, peer.memory(LENGTH))
        yield peer
        await put(peer, Feature.DMA_LOGGING_STOP)


async def _started(peer: Peer) -> None:
    reply = await _start(peer)
    expect(not reply.refused, "that DMA_LOGGING_START is granted", reply)


@section.check(MUST)
async def all_or_nothing(server: Server) -> None:
    """A device whose log can be started can be asked to stop it and to report."""
    async with _logging(server) as peer:
        for method, feature in (
            (FeatureFlags.SET, Feature.DMA_LOGGING_STOP),
            (FeatureFlags.GET, Feature.DMA_LOGGING_REPORT),
        ):
            asked = DeviceFeature(DeviceFeature.size, FeatureFlags(FeatureFlags.PROBE | method | feature))
            await peer.granted(Command.DEVICE_FEATURE, asked, what=f"a probe of {feature.name}")


@section.check(MUST)
async def start(server: Server) -> None:
    """The reply to START repeats its data, with the page size that was chosen."""
    async with _logging(server) as peer:
        reply = await _start(peer)
        expect(not reply.refused, "that DMA_LOGGING_START is granted", reply)
        _, data = split(reply, DeviceFeature)
        expect(len(data) == DmaLoggingControl.size, "16 bytes of data", f"{len(data)} bytes")
        chosen = DmaLoggingControl.decode(data)
        power = chosen.page_size > 0 and chosen.page_size & (chosen.page_size - 1) == 0
        expect(power and chosen.num_ranges == 0, "a power of two as page size, no ranges", chosen.pretty())


@section.check(MUST)
async def start_with_ranges(server: Server) -> None:
    """START may name the ranges whose writes are logged."""
    async with _logging(server) as peer:
        ranges = DmaLoggingRange(IOVA, LENGTH).encode()
        reply = await _start(peer, ranges=ranges)
        expect(not reply.refused, "that DMA_LOGGING_START of a range is granted", reply)
        _, data = split(reply, DeviceFeature)
        expect(data[DmaLoggingControl.size :] == ranges, "the range again", data.hex())


@section.check(MUST)
async def report(server: Server) -> None:
    """REPORT gives a bit for each page, in 64-bit words behind the data of the request."""
    async with _logging(server) as peer:
        await _started(peer)
        reply = await _report(peer)
        expect(not reply.refused, "that DMA_LOGGING_REPORT is granted", reply)
        body, data = split(reply, DeviceFeature)
        asked = DmaLoggingReport(IOVA, LENGTH, PAGE).encode()
        expect(data[: len(asked)] == asked, "the request's data again", data[: len(asked)].hex())
        bits = data[len(asked) :]
        expect(len(bits) == BITMAP, f"{BITMAP} bytes of bits for {PAGES} pages", f"{len(bits)} bytes")
        size = DeviceFeature.size + len(data)
        expect(body.argsz == size, f"argsz {size}", body.argsz)


@section.check(MUST)
async def outside_is_zero(server: Server) -> None:
    """Bits behind the last page are zero."""
    async with _logging(server) as peer:
        await _started(peer)
        reply = await _report(peer)
        bits = int.from_bytes(split(reply, DeviceFeature)[1][DmaLoggingReport.size :], "little")
        expect(bits >> PAGES == 0, f"no bit above {PAGES}", hex(bits))


@section.check(MUST)
async def nothing_was_written(server: Server) -> None:
    """Memory that the device cannot have written is clean."""
    async with _logging(server) as peer:
        await _started(peer)
        reply = await _report(peer)
        bits = split(reply, DeviceFeature)[1][DmaLoggingReport.size :]
        expect(not any(bits), "no dirty page of memory that the device does not know", bits.hex())


@section.check(MUST)
async def other_page_sizes(server: Server) -> None:
    """REPORT may ask for another page size than START."""
    async with _logging(server) as peer:
        await _started(peer)
        for page in (2 * PAGE, 16 * PAGE):
            reply = await _report(peer, length=64 * PAGE, page=page)
            expect(not reply.refused, f"that DMA_LOGGING_REPORT in pages of {page} is granted", reply)
            bits = split(reply, DeviceFeature)[1][DmaLoggingReport.size :]
            expect(len(bits) == 8, "8 bytes of bits", f"{len(bits)} bytes")


@section.check(MUST)
async def odd_page_size(server: Server) -> None:
    """The page size of REPORT is a power of two: another is refused."""
    async with _logging(server) as peer:
        await _started(peer)
        for page in (0, 3 * PAGE, PAGE + 1):
            reply = await _report(peer, page=page)
            expect(reply.refused, f"a refusal of pages of {page} bytes", reply)


@section.check(MUST)
async def report_before_start(server: Server) -> None:
    """REPORT is only valid when logging was started."""
    async with _logging(server) as peer:
        reply = await _report(peer)
        expect(reply.refused, "a refusal of REPORT before START", reply)


@section.check(MUST)
async def report_after_stop(server: Server) -> None:
    """STOP ends the log: REPORT is refused after it."""
    async with _logging(server) as peer:
        await _started(peer)
        reply = await put(peer, Feature.DMA_LOGGING_STOP)
        expect(not reply.refused, "that DMA_LOGGING_STOP is granted", reply)
        reply = await _report(peer)
        expect(reply.refused, "a refusal of REPORT after STOP", reply)


@section.check(SHOULD)
async def wraps(server: Server) -> None:
    """Ranges that leave the address space, or are empty, are refused."""
    async with _logging(server) as peer:
        await _started(peer)
        top = (1 << 64) - PAGE
        for iova, length in ((top, 2 * PAGE), (IOVA, 0)):
            reply = await _report(peer, iova, length)
            expect(reply.refused, f"a refusal of {length:#x} bytes from {iova:#x}", reply)


@section.check(SHOULD)
async def too_large(server: Server) -> None:
    """A bitmap longer than the request allows, or than any message, is not sent."""
    async with _logging(server) as peer:
        await _started(peer)
        reply = await _report(peer, 0, 1 << 62)
        good = reply.refused or len(reply.payload) <= DeviceFeature.size + DmaLoggingReport.size
        expect(good, "a refusal of the bits of 4 EiB, or the need in argsz", reply)


@section.check(SHOULD)
async def ranges_that_are_not_there(server: Server) -> None:
    """START with fewer ranges than it says is refused."""
    async with _logging(server) as peer:
        one = DmaLoggingRange(IOVA, LENGTH).encode()
        for told in (2, 0xFFFFFFFF):
            reply = await _start(peer, ranges=one, count=told)
            expect(reply.refused, f"a refusal of 1 range for {told}", reply)


@section.check(EXTENSION)
async def stop_before_start(server: Server) -> None:
    """STOP of a log that was not started is answered."""
    async with _logging(server) as peer:
        await put(peer, Feature.DMA_LOGGING_STOP)
        await peer.quiet("what was answered")


@section.check(EXTENSION)
async def client_takes_it_along(server: Server) -> None:
    """The log ends with its client."""
    async with server.session() as peer:
        if (await _start(peer)).refused:
            raise NotApplicable("the device keeps no log of its writes")
    async with server.session() as peer:
        reply = await _report(peer)
        expect(reply.refused, "a refusal of REPORT to the next client", reply)
