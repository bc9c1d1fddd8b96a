"""Capture files against bytes written by hand from the formats' specifications, and against tcpdump."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware.ports._capture import MAX_BLOCK, CaptureError, CaptureWriter, read_frames
from firmware.ports._port import MAX_FRAME, MIN_FRAME

A = bytes(range(60))
B = bytes(range(100, 161))  # an odd length: pcapng pads it

# --- pcap, by hand


def pcap(
    *records: tuple[int, int, bytes],
    order: str = "<",
    magic: int = 0xA1B2C3D4,
    version: tuple[int, int] = (2, 4),
    link: int = 1,
    extra: bytes = b"",
) -> bytes:
    """A file of (seconds, fraction, frame)."""
    parts = [struct.pack(order + "IHHiIII", magic, *version, 0, 0, 65535, link)]
    for seconds, fraction, frame in records:
        parts += [struct.pack(order + "IIII", seconds, fraction, len(frame), len(frame)), extra, frame]
    return b"".join(parts)


# --- pcapng, by hand


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(order + "I", 12 + len(body))
    return struct.pack(order + "I", kind) + length + body + length


def section(order: str = "<", version: int = 1) -> bytes:
    return block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, version, 0, -1), order)


def option(code: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "HH", code, len(value)) + value + bytes(-len(value) % 4)


def interface(*options: bytes, order: str = "<", link: int = 1, snap: int = 0) -> bytes:
    end = option(0, b"", order) if options else b""
    return block(1, struct.pack(order + "HHI", link, 0, snap) + b"".join(options) + end, order)


def packet(
    ticks: int, frame: bytes, *, order: str = "<", number: int = 0, length: int | None = None
) -> bytes:
    sizes = (len(frame), len(frame) if length is None else length)
    return block(
        6, struct.pack(order + "IIIII", number, ticks >> 32, ticks & 0xFFFFFFFF, *sizes) + frame, order
    )


def old_packet(ticks: int, frame: bytes, *, order: str = "<") -> bytes:
    head = struct.pack(order + "HHIIII", 0, 7, ticks >> 32, ticks & 0xFFFFFFFF, len(frame), len(frame))
    return block(2, head + frame, order)


def simple_packet(frame: bytes, *, order: str = "<", length: int | None = None) -> bytes:
    return block(3, struct.pack(order + "I", len(frame) if length is None else length) + frame, order)


def frames_of(data: bytes) -> list[tuple[float, bytes]]:
    return list(read_frames(BytesIO(data)))


def refusal(data: bytes) -> str:
    with pytest.raises(CaptureError) as refused:
        frames_of(data)
    return str(refused.value)


# --- reading


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("magic", "fraction"), [(0xA1B2C3D4, 250_000), (0xA1B23C4D, 250_000_000)])
def test_pcap_is_read_in_either_byte_order_and_resolution(order: str, magic: int, fraction: int) -> None:
    data = pcap((5, fraction, A), (6, 0, B), order=order, magic=magic)
    assert frames_of(data) == [(5.25, A), (6.0, B)]


def test_the_pcap_of_old_linux_kernels_is_read() -> None:
    assert frames_of(pcap((5, 0, A), (6, 0, B), magic=0xA1B2CD34, extra=bytes(8))) == [(5.0, A), (6.0, B)]


def test_a_pcap_may_say_that_frames_carry_check_sequences() -> None:
    assert frames_of(pcap((5, 0, A), link=0x2400_0001)) == [(5.0, A)]


@pytest.mark.parametrize("order", ["<", ">"])
def test_pcapng_is_read_in_either_byte_order(order: str) -> None:
    data = section(order) + interface(order=order)
    data += packet(5_250_000, A, order=order) + packet(6_000_000, B, order=order)
    assert frames_of(data) == [(5.25, A), (6.0, B)]


@pytest.mark.parametrize(
    ("options", "ticks"),
    [
        ([option(9, b"\x09")], 5_250_000_000),  # if_tsresol: 10^-9 s
        ([option(9, b"\x83")], 42),  # 2^-3 s
        ([option(9, b"\x00"), option(14, struct.pack("<q", 5))], 0),  # if_tsoffset
        ([option(1, "ein Kommentar, größer".encode())], 5_250_000),
    ],
)
def test_an_interface_says_what_its_time_stamps_mean(options: list[bytes], ticks: int) -> None:
    ((stamp, frame),) = frames_of(section() + interface(*options) + packet(ticks, A))
    assert (int(stamp), frame) == (5, A)


def test_each_interface_has_its_own_resolution_and_each_section_its_interfaces() -> None:
    data = section() + interface() + interface(option(9, b"\x00"))
    data += packet(1_000_000, A, number=0) + packet(2, B, number=1)
    data += section(">") + interface(option(9, b"\x00", ">"), order=">") + packet(3, A, order=">")
    assert frames_of(data) == [(1.0, A), (2.0, B), (3.0, A)]


def test_packets_of_the_older_and_the_simple_kind_are_read() -> None:
    data = section() + interface() + old_packet(2_000_000, A) + simple_packet(B)
    assert frames_of(data) == [(2.0, A), (2.0, B)]


def test_what_is_not_about_packets_is_passed_over() -> None:
    statistics, names, unknown = block(5, bytes(12)), block(4, bytes(8)), block(0x0BAD, bytes(100))
    assert frames_of(section() + names + interface() + unknown + packet(0, A) + statistics) == [(0.0, A)]


@pytest.mark.parametrize("data", [pcap(), section(), section() + interface()])
def test_a_file_may_hold_no_frames(data: bytes) -> None:
    assert frames_of(data) == []


def test_the_shortest_and_the_longest_frame_are_read() -> None:
    data = pcap((0, 0, bytes(MIN_FRAME)), (0, 0, bytes(MAX_FRAME)))
    assert [len(frame) for _, frame in frames_of(data)] == [MIN_FRAME, MAX_FRAME]


def test_a_file_can_be_read_again_from_its_beginning() -> None:
    file = BytesIO(pcap((1, 0, A), (2, 0, B)))
    assert list(read_frames(file)) == list(read_frames(file))


# --- refusals

EPB = packet(0, A)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is neither a pcap nor a pcapng file"),
        (b"\xa1\xb2", "it is neither a pcap nor a pcapng file"),
        (b"#!/bin/sh\n", "it is neither a pcap nor a pcapng file"),
        (b"\x1f\x8b\x08\x00", "it is compressed; gunzip it first"),
        (pcap()[:-1], "it ends within its header"),
        (pcap(version=(1, 2)), "it is of version 1.2 of pcap; 2.4 is known"),
        (
            pcap(link=113),
            "its frames are of link type 113, not Ethernet (1); capture on an Ethernet interface",
        ),
        (pcap((0, 0, A))[:-1], "it ends within frame 1"),
        (pcap((0, 0, A), (0, 0, B))[: 24 + 16 + 60 + 15], "it ends within the header of frame 2"),
        (pcap((0, 0, bytes(MIN_FRAME - 1))), "frame 1 has 13 bytes; a card's has 14 to 65553"),
        (pcap((0, 0, bytes(MAX_FRAME + 1))), "frame 1 has 65554 bytes; a card's has at most 65553"),
        (pcap() + struct.pack("<IIII", 0, 0, 60, 1514) + A, "frame 1 was cut from 1514 to 60 bytes"),
        (pcap() + struct.pack("<IIII", 0, 0, 0xFFFFFFFF, 60), "frame 1 has 4294967295 bytes"),
        (section()[:-5], "it ends within block 1"),
        (section()[:10], "it ends within block 1"),
        (section(version=2), "it is of version 2.0 of pcapng; 1.0 is known"),
        (section().replace(b"\x4d\x3c\x2b\x1a", b"spam"), "a section header has no byte-order mark"),
        (section() + interface(link=276), "its frames are of link type 276"),
        (section() + EPB, "block 2 is of an interface that is not described"),
        (section() + simple_packet(A), "block 2 is of an interface that is not described"),
        (section() + interface() + section() + EPB, "block 4 is of an interface that is not described"),
        (section() + interface() + EPB[:-1], "it ends within block 3"),
        (section() + interface() + EPB[:7], "it ends within block 3"),
        (section() + interface() + EPB[:-4] + bytes(4), "the two lengths of block 3 differ"),
        (section() + struct.pack("<II", 5, 4), "block 2 is said to have 4 bytes, which no block has"),
        (section() + struct.pack("<II", 5, 18), "block 2 is said to have 18 bytes, which no block has"),
        (section() + struct.pack("<II", 5, MAX_BLOCK + 4), f"block 2 is said to have {MAX_BLOCK + 4} bytes"),
        (section() + block(1, b""), "block 2 is damaged"),
        (section() + interface() + block(6, b""), "block 3 is damaged"),
        (section() + interface() + block(6, struct.pack("<IIIII", 0, 0, 0, 60, 60)), "block 3 is damaged"),
        (section() + interface(option(9, b"")), "block 2 is damaged"),
        (section() + interface(option(14, b"short")), "block 2 is damaged"),
        (section() + interface(option(1, b"\xff\xff\xff\xff")), "block 2 is damaged"),
        (section() + interface(option(2, bytes(60000)), option(2, bytes(60000))), "block 2 is damaged"),
        (section() + interface() + packet(0, A, length=1514), "frame 1 was cut from 1514 to 60 bytes"),
        (section() + interface(snap=60) + simple_packet(A, length=1514), "frame 1 was cut from 1514 to 60"),
        (section() + interface() + packet(0, bytes(5)), "frame 1 has 5 bytes"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    assert refusal(data).startswith(reason)


WHOLE = (
    pcap((5, 1, A), (6, 2, B)),
    section() + interface(option(9, b"\x06")) + packet(5, A) + simple_packet(B),
)


@given(st.sampled_from(WHOLE), st.data())
def test_a_file_with_any_byte_changed_is_read_or_refused(data: bytes, draw: st.DataObject) -> None:
    place = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[place] = draw.draw(st.integers(0, 255))
    try:
        for _, frame in frames_of(bytes(changed)):
            assert MIN_FRAME <= len(frame) <= MAX_FRAME
    except CaptureError as refused:
        assert len(str(refused).splitlines()) == 1


@given(st.sampled_from(WHOLE), st.data())
def test_a_file_that_breaks_off_gives_whole_frames_only(data: bytes, draw: st.DataObject) -> None:
    part = data[: draw.draw(st.integers(0, len(data)))]
    got = []
    with contextlib.suppress(CaptureError):
        for _, frame in read_frames(BytesIO(part)):
            got.append(frame)
    assert got == [A, B][: len(got)]


@given(st.binary(max_size=200))
def test_no_bytes_behind_a_section_header_are_more_than_refused(data: bytes) -> None:
    with contextlib.suppress(CaptureError):
        frames_of(section() + interface() + data)


# --- writing


def writer(path: Path) -> CaptureWriter:
    return CaptureWriter(os.open(path, os.O_WRONLY | os.O_CREAT))


def test_what_is_written_is_pcap_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    file = writer(path)
    file.write([(1_700_000_000_123_456_789, A), (1_700_000_001_000_000_999, B)])
    file.close()
    assert path.read_bytes() == (
        bytes.fromhex("d4c3b2a1 0200 0400 00000000 00000000 00000400 01000000")
        + struct.pack("<IIII", 1_700_000_000, 123_456, 60, 60)
        + A
        + struct.pack("<IIII", 1_700_000_001, 0, 61, 61)
        + B
    )


def test_the_last_microsecond_of_a_second_stays_in_it(tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    file = writer(path)
    file.write([(1_799_999_999_999_999_999, A)])
    file.close()
    assert struct.unpack_from("<II", path.read_bytes(), 24) == (1_799_999_999, 999_999)


def test_what_was_in_the_file_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    path.write_bytes(bytes(10_000))
    writer(path).close()
    assert path.stat().st_size == 24


@given(frames=st.lists(st.tuples(st.integers(0, (1 << 32) * 10**9 - 1), st.binary(min_size=14, max_size=80))))
def test_what_is_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, frames: list[tuple[int, bytes]]
) -> None:
    path = tmp_path_factory.mktemp("capture") / "out.pcap"
    file = writer(path)
    file.write(frames)
    file.close()
    with path.open("rb") as again:
        got = list(read_frames(again))
    assert [frame for _, frame in got] == [frame for _, frame in frames]
    assert [stamp for stamp, _ in got] == pytest.approx([moment / 1e9 for moment, _ in frames], abs=2e-6)


def test_tcpdump_reads_what_is_written(tmp_path: Path, demand: Callable[[bool, str], None]) -> None:
    demand(shutil.which("tcpdump") is not None, "tcpdump is not installed; apt-get install tcpdump")
    path = tmp_path / "out.pcap"
    arp = bytes.fromhex(
        "ffffffffffff020000000001 0806 0001080006040001 020000000001 0a000002 000000000000 0a000001"
    )
    file = writer(path)
    longest = bytes(12) + b"\x88\xb5" + bytes(MAX_FRAME - 14)  # an ethertype for experiments (IEEE 802)
    file.write([(1_700_000_000_123_456_000, arp), (1_700_000_002_000_000_000, longest)])
    file.close()
    shown = subprocess.run(
        ["tcpdump", "-n", "-e", "-tt", "-r", str(path)], capture_output=True, text=True, check=True
    )
    first, second, *_ = shown.stdout.splitlines()
    assert first.startswith("1700000000.123456 02:00:00:00:00:01 > ff:ff:ff:ff:ff:ff, ethertype ARP")
    assert "who-has 10.0.0.1 tell 10.0.0.2" in first
    assert second.startswith("1700000002.000000")
    assert f"length {MAX_FRAME}" in second


def test_a_full_disk_leaves_whole_frames(tmp_path: Path) -> None:
    path = tmp_path / "out.pcap"
    file = writer(path)
    file.write([(0, A)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))  # Python ignores SIGXFSZ: the write is short
    try:
        with pytest.raises(OSError, match="File too large"):
            file.write([(0, B)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == pcap((0, 0, A)).replace(b"\xff\xff\0\0\1", b"\0\0\4\0\1")
    file.write([(0, B)])
    file.close()
    file.close()
    with path.open("rb") as again:
        assert [frame for _, frame in read_frames(again)] == [A, B]
