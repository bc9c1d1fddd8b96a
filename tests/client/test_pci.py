"""Configuration spaces laid out by hand."""

from __future__ import annotations

import struct

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from client.errors import DeviceError
from client.pci import Command, ConfigSpace, PciControl, VirtioCapability, read_config
from tests.client.peer import REGION_READ, REGION_WRITE, FakeRegion, session_with


def card() -> bytearray:
    """A network card: a 32-bit BAR 0, an I/O BAR 1, a 64-bit prefetchable BAR 2, five capabilities."""
    raw = bytearray(4096)
    struct.pack_into("<HHHHI", raw, 0, 0x1AF4, 0x1041, 0x0006, 0x0010, 0x020000 << 8 | 0x01)
    struct.pack_into("<B", raw, 0x0E, 0x80)
    struct.pack_into("<IIII", raw, 0x10, 0xFEBF_0000, 0xC001, 0x0000_000C, 0x0000_0038)
    struct.pack_into("<HH", raw, 0x2C, 0x8086, 0x001A)
    raw[0x34], raw[0x3D] = 0x40, 1
    struct.pack_into("<BBHII", raw, 0x40, 0x11, 0x50, 0x8003, 0x2000, 0x3000 | 2)
    struct.pack_into("<BBBBBBHII", raw, 0x50, 0x09, 0x60, 16, 1, 0, 0, 0, 0x0, 0x38)
    struct.pack_into("<BBBBBBHIII", raw, 0x60, 0x09, 0x78, 20, 2, 0, 3, 0, 0x3000, 0x1000, 4)
    struct.pack_into("<BB", raw, 0x78, 0x10, 0x00)
    struct.pack_into("<I", raw, 0x100, 0x150 << 20 | 1 << 16 | 0x0003)
    struct.pack_into("<I", raw, 0x150, 0 << 20 | 1 << 16 | 0x000B)
    return raw


def test_the_header_is_decoded() -> None:
    config = ConfigSpace(bytes(card()))
    assert (config.vendor, config.device, config.revision) == (0x1AF4, 0x1041, 1)
    assert config.command == Command.MEMORY | Command.MASTER
    assert config.class_code == 0x020000
    assert config.subsystem == (0x8086, 0x001A)
    assert (config.header_type, config.interrupt_pin) == (0, 1)


def test_a_64_bit_bar_takes_two_registers() -> None:
    config = ConfigSpace(bytes(card()))
    assert [(bar.index, bar.io, bar.is_64bit, bar.prefetchable, bar.address) for bar in config.bars] == [
        (0, False, False, False, 0xFEBF_0000),
        (1, True, False, False, 0xC000),
        (2, False, True, True, 0x38_0000_0000),
        (4, False, False, False, 0),
        (5, False, False, False, 0),
    ]


def test_capabilities_come_in_list_order_with_their_bytes() -> None:
    config = ConfigSpace(bytes(card()))
    assert [(entry.id, entry.offset, len(entry.data)) for entry in config.capabilities] == [
        (0x11, 0x40, 16),
        (0x09, 0x50, 16),
        (0x09, 0x60, 24),
        (0x10, 0x78, 0x88),
    ]
    assert [(entry.id, entry.offset) for entry in config.extended_capabilities] == [(3, 0x100), (11, 0x150)]


def test_msix_is_decoded() -> None:
    msix = ConfigSpace(bytes(card())).msix
    assert msix is not None
    assert (msix.offset, msix.vectors, msix.enabled, msix.masked) == (0x40, 4, True, False)
    assert (msix.table, msix.pba) == ((0, 0x2000), (2, 0x3000))


def test_virtio_structures_are_decoded() -> None:
    assert ConfigSpace(bytes(card())).virtio == (
        VirtioCapability(1, 0, 0, 0, 0x38, 0, 0x50),
        VirtioCapability(2, 0, 3, 0x3000, 0x1000, 4, 0x60),
    )


def test_a_conventional_space_has_no_extended_capabilities() -> None:
    config = ConfigSpace(bytes(card()[:256]))
    assert config.extended_capabilities == ()
    assert len(config.capabilities) == 4


def test_without_the_status_bit_there_is_no_list() -> None:
    raw = card()
    raw[0x06] = 0
    assert ConfigSpace(bytes(raw)).capabilities == ()


def test_a_capability_list_that_loops_is_refused() -> None:
    raw = card()
    raw[0x79] = 0x50
    with pytest.raises(DeviceError, match="goes to 0x50"):
        _ = ConfigSpace(bytes(raw)).capabilities


def test_an_extended_list_that_loops_is_refused() -> None:
    raw = card()
    struct.pack_into("<I", raw, 0x150, 0x100 << 20 | 1 << 16 | 0x000B)
    with pytest.raises(DeviceError, match="goes to 0x100"):
        _ = ConfigSpace(bytes(raw)).extended_capabilities


@pytest.mark.parametrize("empty", [0, 0xFFFF_FFFF])
def test_an_empty_extended_space_is_no_list(empty: int) -> None:
    raw = card()
    struct.pack_into("<I", raw, 0x100, empty)
    assert ConfigSpace(bytes(raw)).extended_capabilities == ()


def test_too_short_a_space_is_refused() -> None:
    with pytest.raises(DeviceError, match="64 bytes"):
        ConfigSpace(bytes(64))


@given(st.binary(min_size=256, max_size=256), st.sampled_from([256, 4096]))
def test_any_space_is_either_decoded_or_refused(head: bytes, size: int) -> None:
    config = ConfigSpace(head * (size // 256))
    for name in ("bars", "capabilities", "extended_capabilities", "msix", "virtio"):
        try:
            getattr(config, name)
        except DeviceError:
            continue


async def test_the_space_is_read_and_bits_are_set() -> None:
    async with session_with(regions={7: FakeRegion(4096)}) as (session, peer), trio.open_nursery() as nursery:
        written: list[tuple[int, int]] = []

        async def serve() -> None:
            message = await peer.expect(REGION_READ)
            peer.reply(message, message.payload + bytes(card()))
            for _ in range(4):
                message = await peer.expect(REGION_WRITE)
                offset, region, count = struct.unpack_from("=QII", message.payload)
                assert (region, count) == (7, 2)
                written.append((offset, struct.unpack_from("<H", message.payload, 16)[0]))
                peer.reply(message, message.payload[:16])

        nursery.start_soon(serve)
        config = await read_config(session)
        control = PciControl(session, config)
        await control.set_command(Command.INTX_DISABLE)
        await control.set_command(Command.MASTER, on=False)
        await control.set_msix(enabled=True, masked=True)
        await control.set_msix(enabled=False)
        assert written == [(4, 0x0406), (4, 0x0402), (0x42, 0xC000), (0x42, 0)]


async def test_a_device_without_configuration_space_is_refused() -> None:
    async with session_with() as (session, _):
        with pytest.raises(DeviceError, match="no configuration space"):
            await read_config(session)
