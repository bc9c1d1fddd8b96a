from __future__ import annotations

import contextlib
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import RemoteProtocolError
from protocol.io_fds import io_fds_reply, parse_io_fds
from protocol.limits import MAX_IO_FDS
from protocol.messages import IoEventFd, IoRegionFd, RegionIoFds
from protocol.vfio import IoEventFdFlags, IoRegionFdFlags

DOORBELL = IoEventFd(0x3000, 2, 0)
MATCHING = IoEventFd(0x3002, 2, 1, flags=IoEventFdFlags.DATAMATCH, datamatch=7)
BY_MESSAGE = IoRegionFd(0x4000, 0x1000, 2, flags=IoRegionFdFlags.POSTED_WRITES, user_data=99)
ENTRY = "=QQIIIIQ"


@pytest.mark.skipif(sys.byteorder != "little", reason="the bytes below are a little-endian host's")
def test_a_reply_is_the_bytes_that_the_spec_tells() -> None:
    record, data = io_fds_reply(4096, 2, [DOORBELL])
    assert record.encode() == bytes.fromhex("38000000 00000000 02000000 01000000")
    assert data == bytes.fromhex(
        "0030000000000000 0200000000000000 00000000 00000000 00000000 00000000 0000000000000000"
    )


def test_entries_of_both_kinds_come_back() -> None:
    entries = (DOORBELL, MATCHING, BY_MESSAGE)
    record, data = io_fds_reply(16 + 3 * 40, 2, entries)
    assert record == RegionIoFds(16 + 3 * 40, 0, 2, 3)
    assert parse_io_fds(record, data, 3) == entries


def test_without_room_the_reply_tells_how_much_it_takes() -> None:
    record, data = io_fds_reply(16 + 2 * 40 - 1, 2, [DOORBELL, MATCHING])
    assert record == RegionIoFds(96, 0, 2, 2)
    assert data == b""
    assert parse_io_fds(record, data, 0) == ()


def test_a_region_may_have_none() -> None:
    record, data = io_fds_reply(16, 7, [])
    assert (record, data) == (RegionIoFds(16, 0, 7, 0), b"")
    assert parse_io_fds(record, data, 0) == ()


def test_a_descriptor_may_be_shared() -> None:
    entries = (IoEventFd(0, 2, 0), IoEventFd(2, 2, 0))
    assert parse_io_fds(*io_fds_reply(4096, 0, entries), 1) == entries


def test_longer_entries_of_libvfio_user_have_their_datamatch_at_the_end() -> None:
    entry = struct.pack("=QQIIIIQQ", 0x10, 4, 0, 0, 1, 77, 0x5555, 42)
    (parsed,) = parse_io_fds(RegionIoFds(64, 0, 0, 1), entry, 1)
    assert parsed == IoEventFd(0x10, 4, 0, flags=IoEventFdFlags.DATAMATCH, datamatch=42)


def test_what_newer_entries_have_beyond_is_skipped() -> None:
    entries = b"".join(entry.encode() + bytes(24) for entry in (DOORBELL, BY_MESSAGE))
    assert parse_io_fds(RegionIoFds(16 + 128, 0, 0, 2), entries, 3) == (DOORBELL, BY_MESSAGE)


def test_as_many_as_a_reply_may_have_are_taken_and_not_one_more() -> None:
    many = [DOORBELL] * MAX_IO_FDS
    assert len(parse_io_fds(*io_fds_reply(1 << 20, 0, many), 1)) == MAX_IO_FDS
    with pytest.raises(ValueError, match="513 sub-regions"):
        io_fds_reply(1 << 20, 0, [*many, DOORBELL])
    with pytest.raises(RemoteProtocolError, match="513 sub-regions"):
        parse_io_fds(RegionIoFds(16, 0, 0, MAX_IO_FDS + 1), DOORBELL.encode() * (MAX_IO_FDS + 1), 1)


@pytest.mark.parametrize(
    ("count", "data", "nr_fds"),
    [
        (1, bytes(39), 1),
        (2, bytes(40), 1),
        (3, bytes(121), 1),
        (1, b"", 0),
        (1, struct.pack(ENTRY, 0, 2, 1, 0, 0, 0, 0), 1),
        (1, struct.pack(ENTRY, 0, 2, 0, 0, 0, 0, 0), 0),
        (1, struct.pack(ENTRY, 0, 2, 0, 2, 0, 0, 0), 1),
        (1, struct.pack(ENTRY, 2**64 - 1, 2, 0, 0, 0, 0, 0), 1),
        (1, struct.pack(ENTRY, 0, 2, 0xFFFF_FFFF, 0, 0, 0, 0), 1),
    ],
)
def test_a_malformed_reply_is_refused(count: int, data: bytes, nr_fds: int) -> None:
    with pytest.raises(RemoteProtocolError) as refusal:
        parse_io_fds(RegionIoFds(16, 0, 0, count), data, nr_fds)
    assert not refusal.value.fatal


@given(st.integers(0, 2**32 - 1), st.integers(0, 600), st.binary(max_size=200), st.integers(0, 4))
def test_any_bytes_are_entries_or_refused(argsz: int, count: int, data: bytes, nr_fds: int) -> None:
    with contextlib.suppress(RemoteProtocolError):
        for entry in parse_io_fds(RegionIoFds(argsz, 0, 0, count), data, nr_fds):
            assert entry.fd_index < nr_fds
            assert entry.offset + entry.length <= 2**64
