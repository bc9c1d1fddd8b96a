"""The type 0 header, as software probes it."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.errors import DeviceError
from device.identity import Identity
from device.pci.bars import Bar, BarKind
from device.pci.config_space import CONFIG_SIZE, Command, ConfigSpace, Status

IDENTITY = Identity(0x1AF4, 0x1041, 0x8086, 0x001A)
BAR0 = 0x10
ALL_ONES = b"\xff" * 4

mem32_sizes = [1 << bit for bit in range(4, 32)]
mem64_sizes = [1 << bit for bit in range(4, 64)]


def word(config: ConfigSpace, offset: int, count: int = 4) -> int:
    return int.from_bytes(config.read(offset, count), "little")


def test_the_identity_is_where_software_looks() -> None:
    config = ConfigSpace(Identity(0x1AF4, 0x1041, 0x8086, 0x001A, revision=1, class_code=0x020000))
    assert word(config, 0x00) == 0x1041_1AF4
    assert word(config, 0x08) == 0x020000_01
    assert word(config, 0x2C) == 0x001A_8086
    assert config.read(0x0E, 1) == b"\0"
    assert config.read(0x3D, 1) == b"\1"


@pytest.mark.parametrize("offset", [0x00, 0x02, 0x08, 0x0A, 0x0E, 0x2C, 0x2E, 0x30, 0x34, 0x3D])
def test_what_identifies_the_function_cannot_be_written(offset: int) -> None:
    config = ConfigSpace(IDENTITY)
    before = config.read(0, 64)
    config.write(offset, b"\xff\xff" if offset != 0x3D else b"\xff")
    assert config.read(0, 64) == before


def test_extended_space_is_there_and_its_list_is_empty() -> None:
    config = ConfigSpace(IDENTITY)
    assert config.read(0x100, 4) == bytes(4)
    assert config.read(CONFIG_SIZE - 4, 4) == bytes(4)
    config.write(0x100, ALL_ONES)
    assert config.read(0x100, 4) == bytes(4)


def test_beyond_4096_bytes_there_is_nothing() -> None:
    with pytest.raises(DeviceError) as refusal:
        ConfigSpace(IDENTITY).read(CONFIG_SIZE - 2, 4)
    assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize("size", mem32_sizes)
@pytest.mark.parametrize("index", range(6))
def test_a_32_bit_bar_is_sized_by_writing_ones(size: int, index: int) -> None:
    config = ConfigSpace(IDENTITY, [Bar(index, size, prefetchable=True)])
    offset = BAR0 + 4 * index
    assert word(config, offset) == 0x8
    config.write(offset, ALL_ONES)
    probed = word(config, offset)
    assert probed & 0xF == 0x8
    assert -(probed & ~0xF) & 0xFFFF_FFFF == size


@pytest.mark.parametrize("size", mem64_sizes)
@pytest.mark.parametrize("index", [0, 2, 4])
def test_a_64_bit_bar_is_sized_by_writing_ones_to_both_halves(size: int, index: int) -> None:
    config = ConfigSpace(IDENTITY, [Bar(index, size, kind=BarKind.MEM64)])
    offset = BAR0 + 4 * index
    config.write(offset, ALL_ONES)
    config.write(offset + 4, ALL_ONES)
    probed = word(config, offset + 4) << 32 | word(config, offset)
    assert probed & 0xF == 0x4
    assert -(probed & ~0xF) & (1 << 64) - 1 == size


@given(st.sampled_from(mem64_sizes), st.integers(0, (1 << 64) - 1))
def test_a_bar_keeps_an_address_aligned_to_its_size(size: int, address: int) -> None:
    config = ConfigSpace(IDENTITY, [Bar(2, size, kind=BarKind.MEM64, prefetchable=True)])
    config.write(0x18, (address & 0xFFFF_FFFF).to_bytes(4, "little"))
    config.write(0x1C, (address >> 32).to_bytes(4, "little"))
    assert word(config, 0x18, 8) == address & ~(size - 1) & ~0xF | 0xC


@pytest.mark.parametrize("count", [1, 2])
def test_a_bar_can_be_sized_in_small_accesses(count: int) -> None:
    config = ConfigSpace(IDENTITY, [Bar(0, 0x8000)])
    for offset in range(BAR0, BAR0 + 4, count):
        config.write(offset, b"\xff" * count)
    assert word(config, BAR0) == 0xFFFF_8000


def test_an_absent_bar_reads_zero_whatever_is_written() -> None:
    config = ConfigSpace(IDENTITY, [Bar(0, 0x1000)])
    config.write(BAR0 + 4, ALL_ONES * 5)
    assert config.read(BAR0 + 4, 20) == bytes(20)


@pytest.mark.parametrize(
    "bars",
    [
        [Bar(0, 4096), Bar(0, 4096)],
        [Bar(2, 4096, kind=BarKind.MEM64), Bar(3, 4096)],
        [Bar(1, 4096, kind=BarKind.MEM64), Bar(2, 4096, kind=BarKind.MEM64)],
    ],
)
def test_bars_cannot_share_a_slot(bars: list[Bar]) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        ConfigSpace(IDENTITY, bars)


@given(st.integers(0, 0xFFFF))
def test_command_keeps_the_bits_that_a_pci_express_function_has(value: int) -> None:
    config = ConfigSpace(IDENTITY)
    config.write(0x04, value.to_bytes(2, "little"))
    assert config.command == value & 0x0546


def test_the_command_that_slof_writes_is_accepted() -> None:
    config = ConfigSpace(IDENTITY)
    config.write(0x04, b"\x40\x01")
    assert Command.describe(config.command) == "0x0140 (PARITY, SERR)"


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_error_bits_of_status_are_cleared_by_writing_ones(errors: int, written: int) -> None:
    config = ConfigSpace(IDENTITY)
    config.store(ConfigSpace.STATUS, 2, errors & Status.WRITE_ONE_CLEAR)
    config.write(ConfigSpace.STATUS, written.to_bytes(2, "little"))
    assert word(config, ConfigSpace.STATUS, 2) == errors & Status.WRITE_ONE_CLEAR & ~written


def test_a_dword_write_of_command_leaves_status_errors_that_it_does_not_name() -> None:
    config = ConfigSpace(IDENTITY)
    config.store(ConfigSpace.STATUS, 2, 0xF900)
    config.write(0x04, b"\x06\x00\x00\x01")
    assert word(config, 0x04) == 0xF800_0006


def test_software_owns_cache_line_size_and_interrupt_line() -> None:
    config = ConfigSpace(IDENTITY)
    config.write(0x0C, b"\x10\xff")
    config.write(0x3C, b"\x0b")
    assert config.read(0x0C, 2) == b"\x10\x00"
    assert config.read(0x3C, 1) == b"\x0b"


def test_without_capabilities_status_says_so() -> None:
    assert word(ConfigSpace(IDENTITY), 0x06, 2) == 0
    listed = ConfigSpace(IDENTITY, first_capability=0x40)
    assert word(listed, 0x06, 2) == 0x10
    assert word(listed, 0x34) == 0x40


@pytest.mark.parametrize("pin", [-1, 5])
def test_there_are_four_interrupt_pins(pin: int) -> None:
    with pytest.raises(ValueError, match="interrupt pin"):
        ConfigSpace(IDENTITY, interrupt_pin=pin)
