"""What travels behind DEVICE_FEATURE: the ranges of DMA_LOGGING_START, the size of dirty bitmaps, and which
requests make sense (spec, "VFIO_USER_DEVICE_FEATURE").
"""

from __future__ import annotations

from collections.abc import Sequence
from errno import EINVAL
from typing import Final

from protocol.dma_buf import parse_dma_buf
from protocol.errors import RemoteProtocolError
from protocol.limits import ADDRESS_SPACE, MAX_LOGGED_RANGES
from protocol.messages import (
    DeviceFeature,
    DmaLoggingControl,
    DmaLoggingRange,
    DmaLoggingReport,
    FeatureMigration,
    FeatureMigState,
)
from protocol.vfio import FEATURE_MASK, Feature, FeatureFlags

METHODS: Final = FeatureFlags.GET | FeatureFlags.SET | FeatureFlags.PROBE

_WORD: Final = 8
"""Bytes of the words that a dirty bitmap is made of (spec, "an array of u64s")."""


def bitmap_size(length: int, page_size: int) -> int:
    """Bytes of the dirty bitmap of `length` bytes of memory: a bit for each `page_size` bytes, in whole
    64-bit words.
    """
    pages = -(-length // page_size)
    return -(-pages // (8 * _WORD)) * _WORD


def pack_logging_start(page_size: int, ranges: Sequence[tuple[int, int]]) -> bytes:
    """Data of DMA_LOGGING_START for ranges of (iova, length), none meaning all memory. Raises ValueError
    for more of them than a server takes.
    """
    if len(ranges) > MAX_LOGGED_RANGES:
        raise ValueError(f"{len(ranges)} ranges to log, more than {MAX_LOGGED_RANGES}")
    control = DmaLoggingControl(page_size, len(ranges))
    return control.encode() + b"".join(DmaLoggingRange(*span).encode() for span in ranges)


def parse_logging_start(data: bytes) -> tuple[DmaLoggingControl, tuple[DmaLoggingRange, ...]]:
    """Data of DMA_LOGGING_START. Raises RemoteProtocolError(EINVAL, not fatal) if the ranges are too many,
    are not as many as is said, or one is empty or wraps.
    """
    if len(data) < DmaLoggingControl.size:
        raise _malformed(f"{len(data)} bytes")
    control = DmaLoggingControl.decode(data)
    if control.num_ranges > MAX_LOGGED_RANGES:
        raise _malformed(f"{control.num_ranges} ranges, more than {MAX_LOGGED_RANGES}")
    if len(data) != DmaLoggingControl.size + control.num_ranges * DmaLoggingRange.size:
        raise _malformed(f"{control.num_ranges} ranges in {len(data)} bytes")
    starts = range(DmaLoggingControl.size, len(data), DmaLoggingRange.size)
    ranges = tuple(DmaLoggingRange.decode(data, start) for start in starts)
    for one in ranges:
        if one.length == 0 or one.length > ADDRESS_SPACE - one.iova:
            raise _malformed(f"range {one.iova:#x}+{one.length:#x}")
    return control, ranges


def check_feature(body: DeviceFeature, data: bytes, most: int) -> str | None:
    """Why a DEVICE_FEATURE request is malformed, None if it is not; `most` is the largest bitmap in bytes.

    GET and SET exclude each other except in a PROBE, and one of the three must be there. The reply to
    anything but a GET repeats the request, so argsz must have room for that. Which feature may be got or
    set is the device's to say.
    """
    flags = int(body.flags)
    if flags & ~(FEATURE_MASK | int(METHODS)):
        return f"DEVICE_FEATURE flags {flags:#x}"
    method = body.flags & METHODS
    if not method & FeatureFlags.PROBE and method not in (FeatureFlags.GET, FeatureFlags.SET):
        return f"DEVICE_FEATURE flags {flags:#x} are not one method"
    needed = DeviceFeature.size + len(data)
    if method == FeatureFlags.GET:
        content = _got(body.feature, data, most)
        if isinstance(content, str):
            return content
        needed = DeviceFeature.size + content
    elif method == FeatureFlags.SET:
        reason = _set(body.feature, data)
        if reason is not None:
            return reason
    if body.argsz < needed:
        return f"DEVICE_FEATURE argsz is {body.argsz}, the reply needs {needed}"
    return None


def _got(feature: int, data: bytes, most: int) -> int | str:
    """Bytes of a feature's data in the reply to GET, or why that cannot be asked."""
    if feature == Feature.MIGRATION:
        return FeatureMigration.size
    if feature == Feature.MIG_DEVICE_STATE:
        return FeatureMigState.size
    if feature == Feature.DMA_BUF:
        return _exported(data)
    if feature != Feature.DMA_LOGGING_REPORT:
        return 0
    if len(data) < DmaLoggingReport.size:
        return f"DMA_LOGGING_REPORT of {len(data)} bytes"
    report = DmaLoggingReport.decode(data)
    reason = check_bitmap(report.iova, report.length, report.page_size, most)
    return reason or DmaLoggingReport.size + bitmap_size(report.length, report.page_size)


def _exported(data: bytes) -> int | str:
    try:
        parse_dma_buf(data)
    except RemoteProtocolError as error:
        return error.reason
    return len(data)


def check_bitmap(iova: int, length: int, page_size: int, most: int) -> str | None:
    """Why no dirty bitmap of at most `most` bytes can be given of a span of memory, None if it can."""
    if page_size.bit_count() != 1:
        return f"a dirty bitmap of pages of {page_size} bytes"
    if length == 0 or length > ADDRESS_SPACE - iova:
        return f"a dirty bitmap of {iova:#x}+{length:#x}, which is empty or wraps"
    if bitmap_size(length, page_size) > most:
        return f"a dirty bitmap of {bitmap_size(length, page_size)} bytes, more than {most}"
    return None


def _set(feature: int, data: bytes) -> str | None:
    if feature == Feature.MIG_DEVICE_STATE and len(data) < FeatureMigState.size:
        return f"MIG_DEVICE_STATE of {len(data)} bytes"
    if feature == Feature.DMA_LOGGING_START:
        try:
            parse_logging_start(data)
        except RemoteProtocolError as error:
            return error.reason
    return None


def check_feature_reply(asked: DeviceFeature, sent: bytes, body: DeviceFeature, data: bytes) -> str | None:
    """Why a DEVICE_FEATURE reply does not answer what was `asked`, with `sent` as its data."""
    if body.flags != asked.flags:
        return f"DEVICE_FEATURE {int(asked.flags):#x} answered for {int(body.flags):#x}"
    if asked.flags & METHODS != FeatureFlags.GET:
        return None
    needed = _got(asked.feature, sent, ADDRESS_SPACE)
    if isinstance(needed, int) and len(data) < needed:
        return f"feature {asked.feature} answered with {len(data)} bytes, not {needed}"
    head = sent[: DmaLoggingReport.size]
    if asked.feature == Feature.DMA_LOGGING_REPORT and data[: DmaLoggingReport.size] != head:
        return "DMA_LOGGING_REPORT answered for another span"
    if asked.feature == Feature.DMA_BUF and data != sent:
        return "DMA_BUF answered for another part of a BAR"
    return None


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(EINVAL, f"DMA_LOGGING_START with {what}", fatal=False)
