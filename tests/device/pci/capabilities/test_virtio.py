"""Where virtio's structures lie, and the window into the BARs."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device.function import Bar, MemoryBar, PciFunction, RegionIndex
from device.pci.capabilities import VirtioCapability, VirtioCfgType, VirtioNotify, VirtioPciCfgAccess
from tests.device.pci.capabilities.functions import a_function, get, put


class Memory:
    """A sub-range that remembers the sizes of its accesses."""

    def __init__(self, size: int) -> None:
        self.bytes = bytearray(size)
        self.sizes: list[int] = []

    def read(self, offset: int, count: int) -> int:
        self.sizes.append(count)
        return int.from_bytes(self.bytes[offset : offset + count], "little")

    def write(self, offset: int, count: int, value: int) -> None:
        self.sizes.append(count)
        self.bytes[offset : offset + count] = value.to_bytes(count, "little")


def test_a_structure_is_described_as_the_specification_lays_it_out() -> None:
    capability = VirtioCapability(VirtioCfgType.DEVICE, 4, 0x2000, 0x18)
    function = a_function(capability, bars=[Bar(4, 0x8000)])
    raw = function.region_read(RegionIndex.CONFIG, capability.offset, 16)
    assert struct.unpack("<BBBBBB2xII", raw) == (0x09, 0, 16, 4, 4, 0, 0x2000, 0x18)


def test_the_doorbells_have_a_multiplier() -> None:
    capability = VirtioNotify(0, 0x3000, 0x3000, 4096)
    function = a_function(capability, bars=[Bar(0, 0x8000)])
    raw = function.region_read(RegionIndex.CONFIG, capability.offset, 20)
    assert struct.unpack("<BBBBBB2xIII", raw) == (0x09, 0, 20, 2, 0, 0, 0x3000, 0x3000, 4096)


@pytest.mark.parametrize("multiplier", [1, 3, 6, -4])
def test_a_multiplier_is_zero_or_an_even_power_of_two(multiplier: int) -> None:
    with pytest.raises(ValueError, match="multiplier"):
        VirtioNotify(0, 0, 4096, multiplier)


@pytest.mark.parametrize(("bar", "offset", "length"), [(0, 0x8000, 1), (0, 0x7FFF, 2), (1, 0, 4), (0, -4, 4)])
def test_a_structure_must_lie_in_a_bar(bar: int, offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="COMMON"):
        a_function(VirtioCapability(VirtioCfgType.COMMON, bar, offset, length), bars=[Bar(0, 0x8000)])


def a_window() -> tuple[PciFunction, VirtioPciCfgAccess, Memory]:
    memory = Memory(64)
    bar = Bar(0, 4096)
    bar.claim(0, 64, memory)
    window = VirtioPciCfgAccess()
    return a_function(window, bars=[bar, MemoryBar(2, 4096)]), window, memory


def aim(function: PciFunction, window: VirtioPciCfgAccess, bar: int, offset: int, length: int) -> None:
    put(function, window, "BAR", bar)
    put(function, window, "OFFSET", offset)
    put(function, window, "LENGTH", length)


@given(st.sampled_from([1, 2, 4]), st.integers(0, 15), st.integers(0, 0xFFFF_FFFF))
def test_an_access_to_the_window_is_one_access_to_the_bar(length: int, slot: int, value: int) -> None:
    function, window, memory = a_window()
    value &= (1 << 8 * length) - 1
    aim(function, window, 0, slot * length, length)
    put(function, window, "DATA", value)
    assert int.from_bytes(memory.bytes[slot * length : slot * length + length], "little") == value
    memory.bytes[slot * length : slot * length + length] = (value ^ 1).to_bytes(length, "little")
    assert get(function, window, "DATA") & (1 << 8 * length) - 1 == value ^ 1
    assert memory.sizes == [length, length]


def test_a_narrow_access_to_the_window_is_passed_on_too() -> None:
    function, window, memory = a_window()
    aim(function, window, 0, 6, 2)
    function.region_write(RegionIndex.CONFIG, window.at("DATA"), b"\x34\x12")
    assert memory.bytes[6:8] == b"\x34\x12"
    assert function.region_read(RegionIndex.CONFIG, window.at("DATA"), 2) == b"\x34\x12"
    assert memory.sizes == [2, 2]


def test_a_window_reaches_memory_bars() -> None:
    function, window, _ = a_window()
    aim(function, window, 2, 0x800, 4)
    put(function, window, "DATA", 0x12345678)
    assert function.region_read(2, 0x800, 4) == b"\x78\x56\x34\x12"


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        (0, 0, 0),
        (0, 0, 3),
        (0, 0, 8),
        (0, 2, 4),
        (0, 1, 2),
        (1, 0, 4),
        (7, 0, 4),
        (255, 0, 4),
        (0, 4096, 4),
        (0, 0xFFFF_FFFC, 4),
    ],
)
def test_a_window_that_cannot_be_passes_nothing_on(bar: int, offset: int, length: int) -> None:
    function, window, memory = a_window()
    aim(function, window, bar, offset, length)
    put(function, window, "DATA", 0xFFFF_FFFF)
    get(function, window, "DATA")
    assert memory.sizes == []
    assert memory.bytes == bytes(64)


def test_reading_all_of_configuration_space_at_power_on_touches_no_bar() -> None:
    function, _, memory = a_window()
    function.region_read(RegionIndex.CONFIG, 0, 4096)
    assert memory.sizes == []
