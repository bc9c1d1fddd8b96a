"""Records against bytes written by hand from the spec's tables, then against themselves."""

from __future__ import annotations

import re
import sys
from enum import IntFlag

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import messages, vfio
from protocol._fields import U32, Record, layout_table, record
from protocol.messages import (
    Bitmap,
    CapabilityHeader,
    DeviceFeature,
    DeviceInfo,
    DmaAccess,
    DmaBuf,
    DmaBufRange,
    DmaLoggingControl,
    DmaLoggingRange,
    DmaLoggingReport,
    DmaMap,
    DmaUnmap,
    FeatureMigration,
    FeatureMigState,
    Header,
    HeaderFlags,
    IoEventFd,
    IoRegionFd,
    IrqInfo,
    MigData,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    SparseMmapArea,
    SparseMmapHeader,
    Version,
    WriteMulti,
    WriteMultiEntry,
)

RECORDS = [
    value for value in vars(messages).values() if isinstance(value, type) and issubclass(value, Record)
]
RECORDS.remove(Record)


def little(text: str) -> bytes:
    """Hex digits of a little-endian host, blanks as you like."""
    return bytes.fromhex(text)


pytestmark = pytest.mark.skipif(
    sys.byteorder != "little", reason="the bytes below are a little-endian host's"
)

WITNESSES: list[tuple[Record, bytes]] = [
    (
        Header(0x1234, 9, 32, HeaderFlags.NO_REPLY, 0),
        little("3412 0900 20000000 10000000 00000000"),
    ),
    (
        Header(7, 2, 16, HeaderFlags.REPLY | HeaderFlags.ERROR, 17),
        little("0700 0200 10000000 21000000 11000000"),
    ),
    (Version(0, 1), little("0000 0100")),
    (
        DmaMap(32, vfio.DmaMapFlags.READ | vfio.DmaMapFlags.WRITE, 0x1000, 0x1_0000_0000, 0x20_0000),
        little("20000000 03000000 0010000000000000 0000000001000000 0000200000000000"),
    ),
    (
        DmaUnmap(24, vfio.DmaUnmapFlags.ALL, 0xFFFF_F000, 0x1000),
        little("18000000 02000000 00f0ffff00000000 0010000000000000"),
    ),
    (
        DeviceInfo(16, vfio.DeviceFlags.RESET | vfio.DeviceFlags.PCI, 9, 5),
        little("10000000 03000000 09000000 05000000"),
    ),
    (
        RegionInfo(
            72,
            vfio.RegionFlags.READ | vfio.RegionFlags.WRITE | vfio.RegionFlags.MMAP | vfio.RegionFlags.CAPS,
            2,
            32,
            0x100_0000,
            0x4000,
        ),
        little("48000000 0f000000 02000000 20000000 0000000100000000 0040000000000000"),
    ),
    (CapabilityHeader(1, 1, 0), little("0100 0100 00000000")),
    (SparseMmapHeader(2), little("02000000 00000000")),
    (SparseMmapArea(0x3000, 0x1000), little("0030000000000000 0010000000000000")),
    (
        IrqInfo(16, vfio.IrqInfoFlags.EVENTFD | vfio.IrqInfoFlags.NORESIZE, 2, 3),
        little("10000000 09000000 02000000 03000000"),
    ),
    (
        SetIrqs(20, vfio.IrqSetFlags.DATA_EVENTFD | vfio.IrqSetFlags.ACTION_TRIGGER, 2, 1, 3),
        little("14000000 24000000 02000000 01000000 03000000"),
    ),
    (RegionAccess(0x14, 7, 4), little("1400000000000000 07000000 04000000")),
    (Bitmap(0x1000, 0x40), little("0010000000000000 4000000000000000")),
    (RegionIoFds(96, 0, 2, 2), little("60000000 00000000 02000000 02000000")),
    (
        IoEventFd(0x3000, 2, 1, flags=vfio.IoEventFdFlags.DATAMATCH, datamatch=0x0102),
        little("0030000000000000 0200000000000000 01000000 00000000 01000000 00000000 0201000000000000"),
    ),
    (
        IoRegionFd(0x3000, 0, 3, flags=vfio.IoRegionFdFlags.POSTED_WRITES, user_data=7),
        little("0030000000000000 0000000000000000 03000000 01000000 02000000 00000000 0700000000000000"),
    ),
    (DmaAccess(0x1_0000_2000, 0x800), little("0020000001000000 0008000000000000")),
    (WriteMulti(2), little("0200000000000000")),
    (
        WriteMultiEntry(0x3002, 4, 2, b"\x01\x00\0\0\0\0\0\0"),
        little("0230000000000000 04000000 02000000 0100000000000000"),
    ),
    (
        DeviceFeature(16, vfio.FeatureFlags.SET | vfio.Feature.MIG_DEVICE_STATE),
        little("10000000 02000200"),
    ),
    (
        FeatureMigration(vfio.MigrationFlags.STOP_COPY | vfio.MigrationFlags.PRE_COPY),
        little("0500000000000000"),
    ),
    (FeatureMigState(vfio.DeviceState.STOP_COPY), little("03000000 00000000")),
    (DmaLoggingControl(0x1000, 2), little("0010000000000000 02000000 00000000")),
    (DmaLoggingRange(0x8000_0000, 0x10_0000), little("0000008000000000 0000100000000000")),
    (
        DmaLoggingReport(0x8000_0000, 0x10_0000, 0x1000),
        little("0000008000000000 0000100000000000 0010000000000000"),
    ),
    (DmaBuf(2, 0o2000002, 0, 1), little("02000000 02000800 00000000 01000000")),
    (DmaBufRange(0x3000, 0x2_0000_0000), little("0030000000000000 0000000002000000")),
    (MigData(72, 64), little("48000000 40000000")),
]


@pytest.mark.parametrize(("value", "wire"), WITNESSES, ids=lambda part: type(part).__name__)
def test_a_record_is_the_bytes_that_the_spec_tells(value: Record, wire: bytes) -> None:
    assert value.encode() == wire
    assert type(value).decode(wire) == value


def test_every_record_has_a_witness() -> None:
    assert {type(value) for value, _ in WITNESSES} == set(RECORDS)


@pytest.mark.parametrize("cls", RECORDS)
@given(data=st.data())
def test_decoding_what_was_encoded_gives_it_back(cls: type[Record], data: st.DataObject) -> None:
    values = [data.draw(st.binary(min_size=f.size, max_size=f.size), f.name) for f in cls.layout]
    value = cls.decode(b"".join(values))
    for field, octets in zip(cls.layout, values, strict=True):
        got = getattr(value, field.name)
        assert octets == (got if isinstance(got, bytes) else got.to_bytes(field.size, sys.byteorder))
    assert cls.decode(b"??" + value.encode() + b"!!", 2) == value


@pytest.mark.parametrize("cls", RECORDS)
def test_a_buffer_that_ends_too_early_is_refused(cls: type[Record]) -> None:
    with pytest.raises(ValueError, match=f"needs {cls.size} bytes"):
        cls.decode(bytes(cls.size - 1))


def test_a_value_too_large_for_its_field_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        RegionAccess(0, 0, 1 << 32).encode()


@pytest.mark.parametrize("data", [b"", b"1234567", b"123456789"])
def test_octets_are_as_many_as_were_declared(data: bytes) -> None:
    with pytest.raises(ValueError, match="8 bytes of data"):
        WriteMultiEntry(0, 0, 1, data).encode()


def test_a_feature_is_the_lower_half_of_its_flags() -> None:
    asked = DeviceFeature.decode(little("08000000 08000100"))
    assert asked.feature == vfio.Feature.DMA_LOGGING_REPORT
    assert vfio.FeatureFlags.GET in asked.flags


def test_a_declaration_that_does_not_add_up_is_an_error() -> None:
    class Short(Record):
        a: U32
        b: U32

    with pytest.raises(TypeError, match="8 bytes, declared as 12"):
        record(size=12)(Short)


def test_flags_come_back_as_flags_and_keep_unknown_bits() -> None:
    flags = DmaMap.decode(bytes(4) + b"\x83" + bytes(27)).flags
    assert isinstance(flags, IntFlag)
    assert flags == 0x83


def test_pretty_names_flags_and_writes_addresses_in_hexadecimal() -> None:
    shown = DmaMap(32, vfio.DmaMapFlags.READ, 0, 0xFEE0_0000, 4096).pretty()
    assert shown == "DmaMap(argsz=32, flags=READ, offset=0x0, address=0xfee00000, length=0x1000)"


def test_pretty_writes_octets_in_hexadecimal() -> None:
    shown = WriteMultiEntry(16, 2, 1, b"\xab" + bytes(7)).pretty()
    assert shown == "WriteMultiEntry(offset=0x10, region=2, count=1, data=ab00000000000000)"


def test_the_layout_table_lists_fields_in_wire_order() -> None:
    rows = [re.split(r" +", row.strip()) for row in layout_table(SetIrqs).splitlines()]
    assert rows == [
        ["0", "4", "argsz"],
        ["4", "4", "flags"],
        ["8", "4", "index"],
        ["12", "4", "start"],
        ["16", "4", "count"],
    ]


@pytest.mark.parametrize("kind", [DmaMap, DmaUnmap, DeviceFeature, SetIrqs, RegionInfo])
def test_flags_that_a_peer_makes_up_are_kept_in_the_record_alone(kind: type[Record]) -> None:
    at = next(field for field in kind.layout if field.flags)
    assert at.flags is not None
    remembered = len(at.flags._value2member_map_)
    for value in range(1 << 20, 1 << 28, 1 << 20):
        sent = bytes(at.offset) + value.to_bytes(4, sys.byteorder) + bytes(kind.size - at.offset - 4)
        one = kind.decode(sent)
        assert (one.encode(), getattr(one, at.name)) == (sent, value)
        assert hex(value) in one.pretty() or at.flags is vfio.FeatureFlags
    assert len(at.flags._value2member_map_) - remembered < 1 << 3
