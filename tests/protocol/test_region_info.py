from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import RemoteProtocolError
from protocol.messages import RegionInfo, SparseMmapArea
from protocol.region_info import (
    SparseMmap,
    UnknownCapability,
    mappable_areas,
    parse_capabilities_chain,
    region_info_reply,
)
from protocol.vfio import RegionFlags

RW = RegionFlags.READ | RegionFlags.WRITE


def chained(data: bytes, *, cap_offset: int = 32, length: int = 0x10000) -> RegionInfo:
    return RegionInfo(32 + len(data), RW | RegionFlags.MMAP | RegionFlags.CAPS, 0, cap_offset, length, 0)


def test_sparse_areas_are_the_bytes_that_the_spec_tells() -> None:
    info, data = region_info_reply(
        4096, index=0, flags=RW | RegionFlags.MMAP, length=0x8000, areas=[(0x1000, 0x1000), (0x4000, 0x2000)]
    )
    assert info == RegionInfo(80, RW | RegionFlags.MMAP | RegionFlags.CAPS, 0, 32, 0x8000, 0)
    assert data == bytes.fromhex(
        "0100 0100 00000000"  # sparse mmap, version 1, last of the chain
        "02000000 00000000"  # two areas
        "0010000000000000 0010000000000000"
        "0040000000000000 0020000000000000"
    )


def test_a_region_without_areas_has_no_chain() -> None:
    info, data = region_info_reply(32, index=7, flags=RW, length=4096)
    assert (info.argsz, info.flags, info.cap_offset, data) == (32, RW, 0, b"")


def test_a_chain_that_does_not_fit_is_left_out_and_the_size_is_told() -> None:
    whole, chain = region_info_reply(4096, index=0, flags=RW, length=4096, areas=[(0, 4096)])
    for argsz in range(32, whole.argsz):
        info, data = region_info_reply(argsz, index=0, flags=RW, length=4096, areas=[(0, 4096)])
        assert data == b""
        assert info.argsz == whole.argsz == 32 + len(chain)
        assert RegionFlags.CAPS not in info.flags
        assert info.cap_offset == 0


@given(st.lists(st.tuples(st.integers(0, 2**63), st.integers(1, 2**62)), min_size=1, max_size=20))
def test_what_is_written_is_read_back(areas: list[tuple[int, int]]) -> None:
    info, data = region_info_reply(
        1 << 20, index=2, flags=RW | RegionFlags.MMAP, length=2**64 - 1, areas=areas
    )
    capabilities = parse_capabilities_chain(info, data)
    assert capabilities == (SparseMmap(tuple(SparseMmapArea(*area) for area in areas)),)
    assert mappable_areas(info, capabilities) == tuple(areas)


def test_other_capabilities_are_kept_as_bytes() -> None:
    data = bytes.fromhex("0200 0100 30000000 aabbccdd 112233440300 0100 00000000")
    assert parse_capabilities_chain(chained(data), data) == (
        UnknownCapability(2, 1, bytes.fromhex("aabbccdd 11223344")),
        UnknownCapability(3, 1, b""),
    )


def test_gaps_before_the_chain_are_skipped() -> None:
    data = bytes(16) + bytes.fromhex("0300 0100 00000000")
    assert parse_capabilities_chain(chained(data, cap_offset=48), data) == (UnknownCapability(3, 1, b""),)


@pytest.mark.parametrize(
    ("what", "cap_offset", "data"),
    [
        ("inside the record", 31, bytes(64)),
        ("outside the message", 4000, bytes(64)),
        ("header cut short", 32, bytes(7)),
        ("to itself", 32, bytes.fromhex("0300 0100 20000000")),
        ("backwards", 40, bytes.fromhex("0300 0100 00000000 0300 0100 20000000")),
        ("sparse header cut short", 32, bytes.fromhex("0100 0100 00000000 01000000")),
        ("more areas than bytes", 32, bytes.fromhex("0100 0100 00000000 02000000 00000000") + bytes(16)),
        ("four billion areas", 32, bytes.fromhex("0100 0100 00000000 ffffffff 00000000") + bytes(16)),
        (
            "too long",
            32,
            b"".join(bytes.fromhex("0300 0100") + (40 + 8 * i).to_bytes(4, "little") for i in range(100)),
        ),
    ],
)
def test_a_malformed_chain_is_refused(what: str, cap_offset: int, data: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_capabilities_chain(chained(data, cap_offset=cap_offset), data)
    assert not refusal.value.fatal


@given(st.binary(max_size=120), st.integers(0, 200))
def test_any_chain_is_either_understood_or_refused(data: bytes, cap_offset: int) -> None:
    info = chained(data, cap_offset=cap_offset)
    try:
        areas = mappable_areas(info, parse_capabilities_chain(info, data))
    except RemoteProtocolError:
        return
    assert all(start >= 0 and start + length <= info.length for start, length in areas)


def test_without_a_capability_the_whole_region_may_be_mapped() -> None:
    assert mappable_areas(RegionInfo(32, RW | RegionFlags.MMAP, 0, 0, 8192, 0), ()) == ((0, 8192),)
    assert mappable_areas(RegionInfo(32, RW, 0, 0, 8192, 0), ()) == ()
    assert mappable_areas(RegionInfo(32, RW | RegionFlags.MMAP, 0, 0, 0, 0), ()) == ()


@pytest.mark.parametrize("area", [(0x1000, 0x1001), (0x2001, 0), (2**64 - 4096, 8192), (0, 0x2001)])
def test_an_area_outside_its_region_is_refused(area: tuple[int, int]) -> None:
    info = RegionInfo(32, RW | RegionFlags.MMAP, 0, 0, 0x2000, 0)
    capability = SparseMmap((SparseMmapArea(*area),))
    if area[1] == 0:
        assert mappable_areas(info, (capability,)) == ()
    else:
        with pytest.raises(RemoteProtocolError):
            mappable_areas(info, (capability,))
