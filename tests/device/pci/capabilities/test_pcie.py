"""The PCI Express endpoint and its function level reset."""

from device.function import Bar, RegionIndex, ResetKind
from device.pci.capabilities import PciExpress
from tests.device.pci.capabilities.functions import a_function, get, put

INITIATE_RESET = 1 << 15


def test_function_level_reset_is_offered() -> None:
    express = PciExpress()
    assert get(a_function(express), express, "DEVICE_CAPABILITIES") & 1 << 28


def test_writing_initiate_resets_the_function_before_the_write_returns() -> None:
    express = PciExpress()
    function = a_function(express, bars=[Bar(0, 4096)])
    kinds: list[ResetKind] = []
    function.on_reset = kinds.append
    function.region_write(RegionIndex.CONFIG, 0x10, b"\x00\x00\x00\xfe")
    function.region_write(RegionIndex.CONFIG, 0x04, b"\x06\x04")
    put(function, express, "DEVICE_CONTROL", INITIATE_RESET | 0x000F)
    assert kinds == [ResetKind.FLR]
    assert function.region_read(RegionIndex.CONFIG, 0x10, 4) == bytes(4)
    assert function.region_read(RegionIndex.CONFIG, 0x04, 2) == bytes(2)
    assert get(function, express, "DEVICE_CONTROL") == 0x2810


def test_initiate_in_a_byte_write_resets_too() -> None:
    express = PciExpress()
    function = a_function(express)
    kinds: list[ResetKind] = []
    function.on_reset = kinds.append
    function.region_write(RegionIndex.CONFIG, express.at("DEVICE_CONTROL") + 1, b"\x80")
    assert kinds == [ResetKind.FLR]


def test_initiate_reads_zero_and_other_writes_do_not_reset() -> None:
    express = PciExpress()
    function = a_function(express)
    kinds: list[ResetKind] = []
    function.on_reset = kinds.append
    put(function, express, "DEVICE_CONTROL", 0x7FFF)
    assert get(function, express, "DEVICE_CONTROL") == 0x78FF
    assert kinds == []


def test_device_status_bits_are_cleared_by_writing_ones() -> None:
    express = PciExpress()
    function = a_function(express)
    function.config.store(express.at("DEVICE_STATUS"), 2, 0x000F)
    put(function, express, "DEVICE_STATUS", 0x0005)
    assert get(function, express, "DEVICE_STATUS") == 0x000A
