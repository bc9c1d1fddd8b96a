"""Which pages of its windows a device wrote to (spec, "VFIO_DEVICE_FEATURE_DMA_LOGGING_START" and what
follows it).

    log = DirtyLog(session)
    await log.start()
    bitmap = await log.report(memory.iova, memory.size)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from client.errors import BadReplyError, ClientError
from client.session import Session
from protocol import Command
from protocol.features import bitmap_size, pack_logging_start
from protocol.limits import MAX_REPORT
from protocol.messages import Bitmap, DmaLoggingControl, DmaLoggingReport, DmaUnmap
from protocol.vfio import DmaUnmapFlags, Feature

WORD: Final = 64
"""A bitmap is made of 64-bit numbers in the host's byte order."""


LEAST_PAGE: Final = 4096
"""Bytes of the smallest pages that are remembered here: a server could make smaller ones cost more memory
than it was given.
"""


@dataclass(frozen=True, slots=True)
class DirtyBitmap:
    """A bit for each page of `page_size` bytes from `iova` on; `words` are 64 bits each."""

    iova: int
    length: int
    page_size: int
    words: tuple[int, ...]

    def pages(self) -> Iterator[int]:
        """The addresses of the dirty pages, in order."""
        for at, word in enumerate(self.words):
            while word:
                lowest = word & -word
                yield self.iova + (at * WORD + lowest.bit_length() - 1) * self.page_size
                word ^= lowest

    def count(self) -> int:
        """How many pages are dirty."""
        return sum(word.bit_count() for word in self.words)


class DirtyLog:
    """The log of one session's device. What the device writes by DMA_WRITE is logged on this side, for the
    server sees it leave only.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    async def start(self, page_size: int = 4096, ranges: Sequence[tuple[int, int]] = ()) -> int:
        """Log writes to the (iova, length) of `ranges`, or to everything; the page size that the device
        keeps its log in. Raises ServerError if it keeps none, or one already, which goes on then.
        """
        _check_page_size(page_size)
        try:
            asked = pack_logging_start(page_size, ranges)
        except ValueError as error:
            raise ClientError(str(error)) from None
        windows = self.session.windows
        before = windows.logging
        if not before:
            windows.log_writes(max(page_size, LEAST_PAGE))
        try:
            data = await self.session.feature_set(Feature.DMA_LOGGING_START, asked)
        except BaseException:
            if not before:
                windows.stop_log()
            raise
        chosen = DmaLoggingControl.decode(data).page_size if len(data) >= DmaLoggingControl.size else 0
        if chosen == 0 or chosen & (chosen - 1):
            raise BadReplyError(Command.DEVICE_FEATURE, f"a log with pages of {chosen} bytes")
        return chosen

    async def stop(self) -> None:
        """Log no more; what was not reported is forgotten."""
        self.session.windows.stop_log()
        await self.session.feature_set(Feature.DMA_LOGGING_STOP)

    async def report(self, iova: int, length: int, page_size: int = 4096) -> DirtyBitmap:
        """The pages between `iova` and `iova` + `length`, both multiples of `page_size`, that were written
        since the last report. If this raises, some of them may be lost: all are to be taken for dirty.
        """
        _check_range(iova, length, page_size)
        words: list[int] = []
        step = min(MAX_REPORT, max(1, self.session.max_read // 8) * 8) * 8 * page_size
        for start in range(iova, iova + length, step):
            words += await self._ask(start, min(step, iova + length - start), page_size)
        return self._with_own(iova, length, page_size, words)

    async def unmap(self, iova: int, length: int, page_size: int = 4096) -> DirtyBitmap:
        """`Session.dma_unmap` that tells which pages of the window were written since the last report. Raises
        ServerError, and the window stays, if the server does not know of this.
        """
        _check_range(iova, length, page_size)
        size = bitmap_size(length, page_size)
        if size > self.session.max_read:
            raise ClientError(f"a bitmap of {size} bytes does not fit into a message of the server's")
        body = DmaUnmap(DmaUnmap.size + Bitmap.size + size, DmaUnmapFlags.GET_DIRTY_BITMAP, iova, length)
        reply = await self.session.unmap(body, Bitmap(page_size, size).encode())
        words = bitmap_words(reply.command, reply.data[Bitmap.size :], length, page_size)
        return self._with_own(iova, length, page_size, [*words])

    def _with_own(self, iova: int, length: int, page_size: int, words: list[int]) -> DirtyBitmap:
        """What the device says together with what was written by message."""
        for start in self.session.windows.take_written(iova, iova + length):
            first = max(start, iova) - iova
            end = min(start + self.session.windows.log_page_size, iova + length) - iova
            for page in range(first // page_size, (end - 1) // page_size + 1):
                words[page // WORD] |= 1 << page % WORD
        return DirtyBitmap(iova, length, page_size, tuple(words))

    async def _ask(self, iova: int, length: int, page_size: int) -> tuple[int, ...]:
        asked = DmaLoggingReport(iova, length, page_size)
        size = bitmap_size(length, page_size)
        data = await self.session.feature_get(
            Feature.DMA_LOGGING_REPORT, asked.encode(), room=DmaLoggingReport.size + size
        )
        return bitmap_words(Command.DEVICE_FEATURE, data[DmaLoggingReport.size :], length, page_size)


def bitmap_words(command: Command, data: bytes, length: int, page_size: int) -> tuple[int, ...]:
    """The words of a bitmap in a reply; raises BadReplyError if it is longer than it must be, or has bits for
    pages that were not asked about.
    """
    if len(data) != bitmap_size(length, page_size):
        raise BadReplyError(command, f"{len(data)} bytes of bitmap for {length // page_size} pages")
    words = tuple(int.from_bytes(data[at : at + 8], sys.byteorder) for at in range(0, len(data), 8))
    spare = len(words) * WORD - length // page_size
    if words and words[-1] >> (WORD - spare):
        raise BadReplyError(command, "a bitmap of pages that were not asked about")
    return words


def _check_page_size(page_size: int) -> None:
    if page_size <= 0 or page_size & (page_size - 1):
        raise ClientError(f"pages of {page_size} bytes")


def _check_range(iova: int, length: int, page_size: int) -> None:
    _check_page_size(page_size)
    if length <= 0 or iova % page_size or length % page_size:
        raise ClientError(f"{iova:#x}+{length:#x} is not made of pages of {page_size:#x} bytes")
