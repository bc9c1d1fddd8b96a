"""The reply to DEVICE_GET_REGION_INFO with its capability chain, both ways (spec, "VFIO region
capabilities").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from errno import EPROTO

from protocol.errors import RemoteProtocolError
from protocol.limits import MAX_CAPABILITIES
from protocol.messages import CapabilityHeader, RegionInfo, SparseMmapArea, SparseMmapHeader
from protocol.vfio import RegionCapability, RegionFlags


@dataclass(frozen=True, slots=True)
class SparseMmap:
    """The parts of a region that may be mapped."""

    areas: tuple[SparseMmapArea, ...]

    def encode_body(self) -> bytes:
        """The capability's bytes after its header."""
        return SparseMmapHeader(len(self.areas)).encode() + b"".join(area.encode() for area in self.areas)


@dataclass(frozen=True, slots=True)
class UnknownCapability:
    """A capability that this project does not decode: its bytes end where the next begins or the message
    ends.
    """

    id: int
    version: int
    body: bytes


Capability = SparseMmap | UnknownCapability


def region_info_reply(
    argsz: int,
    *,
    index: int,
    flags: RegionFlags,
    length: int,
    offset: int = 0,
    areas: Sequence[tuple[int, int]] = (),
) -> tuple[RegionInfo, bytes]:
    """The record and the data of a reply to a request that allows `argsz` bytes.

    `areas`, as (offset, length), become a sparse mmap capability. If it does not fit into `argsz`, the
    reply is the record alone, without CAPS, and its argsz says how much to ask for next time (spec,
    "Message sizes"). QEMU refuses CAPS with a cap_offset of 0, which is what the kernel does there.
    """
    info = RegionInfo(RegionInfo.size, flags & ~RegionFlags.CAPS, index, 0, length, offset)
    if not areas:
        return info, b""
    body = SparseMmap(tuple(SparseMmapArea(*area) for area in areas)).encode_body()
    chain = CapabilityHeader(RegionCapability.SPARSE_MMAP, 1, 0).encode() + body
    needed = RegionInfo.size + len(chain)
    if needed > argsz:
        return replace(info, argsz=needed), b""
    return replace(info, argsz=needed, flags=info.flags | RegionFlags.CAPS, cap_offset=RegionInfo.size), chain


def parse_capabilities_chain(info: RegionInfo, data: bytes) -> tuple[Capability, ...]:
    """The capabilities in a region info reply; `data` is what follows the record.

    Raises RemoteProtocolError(EPROTO, not fatal) if the chain leaves the message, runs backwards or in a
    circle, or is too long.
    """
    if RegionFlags.CAPS not in info.flags or info.cap_offset == 0:
        return ()
    headers: list[tuple[int, CapabilityHeader]] = []
    at = info.cap_offset
    last = 0
    while at:
        if at <= last or at < RegionInfo.size or at + CapabilityHeader.size > RegionInfo.size + len(data):
            raise _malformed(f"capability at {at} of {RegionInfo.size + len(data)} bytes")
        if len(headers) == MAX_CAPABILITIES:
            raise _malformed(f"more than {MAX_CAPABILITIES} capabilities")
        header = CapabilityHeader.decode(data, at - RegionInfo.size)
        headers.append((at, header))
        last, at = at, header.next
    ends = [start for start, _ in headers[1:]] + [RegionInfo.size + len(data)]
    return tuple(
        _decode(header, data[start + CapabilityHeader.size - RegionInfo.size : end - RegionInfo.size])
        for (start, header), end in zip(headers, ends, strict=True)
    )


def _decode(header: CapabilityHeader, body: bytes) -> Capability:
    if (header.id, header.version) != (RegionCapability.SPARSE_MMAP, 1):
        return UnknownCapability(header.id, header.version, body)
    if len(body) < SparseMmapHeader.size:
        raise _malformed("sparse mmap capability cut short")
    count = SparseMmapHeader.decode(body).nr_areas
    if count > (len(body) - SparseMmapHeader.size) // SparseMmapArea.size:
        raise _malformed(f"{count} sparse mmap areas in {len(body)} bytes")
    starts = range(
        SparseMmapHeader.size, SparseMmapHeader.size + count * SparseMmapArea.size, SparseMmapArea.size
    )
    return SparseMmap(tuple(SparseMmapArea.decode(body, start) for start in starts))


def mappable_areas(info: RegionInfo, capabilities: Iterable[Capability]) -> tuple[tuple[int, int], ...]:
    """(offset, length) of what may be mapped: nothing without MMAP, the sparse areas if there are any, else
    the whole region.

    Raises RemoteProtocolError(EPROTO, not fatal) if an area is not inside the region.
    """
    if RegionFlags.MMAP not in info.flags or info.length == 0:
        return ()
    for capability in capabilities:
        if isinstance(capability, SparseMmap):
            areas = tuple((area.offset, area.length) for area in capability.areas if area.length)
            for offset, length in areas:
                if length > info.length or offset > info.length - length:
                    raise _malformed(
                        f"sparse mmap area {offset:#x}+{length:#x} in a region of {info.length:#x} bytes"
                    )
            return areas
    return ((0, info.length),)


def _malformed(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(EPROTO, f"malformed region information: {what}", fatal=False)
