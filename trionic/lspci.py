"""A configuration space as ``lspci -vvv`` shows it: the same words in the same order.

Sources: PCI Local Bus 3.0 chapter 6, PCI Express Base 5.0 section 7.5, PCI Bus Power Management 1.2, virtio
1.3 section 4.1.4. What a capability has beyond the lines here is left out rather than shown raw.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from client.pci import CapabilityEntry, CapabilityId, ConfigSpace, ExtendedCapabilityId

__all__ = ["describe_config", "size_name"]

_CLASSES: Final = {
    0x0100: "SCSI storage controller",
    0x0108: "Non-Volatile memory controller",
    0x0180: "Mass storage controller",
    0x0200: "Ethernet controller",
    0x0280: "Network controller",
    0x0300: "VGA compatible controller",
    0x0500: "RAM memory",
    0x0780: "Communication controller",
    0x0C03: "USB controller",
    0x1200: "Processing accelerators",
}

# Bits from 0 upward; None: not shown.
_CONTROL: Final = (
    *("I/O", "Mem", "BusMaster", "SpecCycle", "MemWINV", "VGASnoop", "ParErr", "Stepping"),
    *("SERR", "FastB2B", "DisINTx"),
)
_ERRORS: Final = ("CorrErr", "NonFatalErr", "FatalErr", "UnsupReq")

_AUX_MILLIAMPERES: Final = (0, 55, 100, 160, 220, 270, 320, 375)
_L0S: Final = ("<64ns", "<128ns", "<256ns", "<512ns", "<1us", "<2us", "<4us", "unlimited")
_L1: Final = ("<1us", "<2us", "<4us", "<8us", "<16us", "<32us", "<64us", "unlimited")
_SPEEDS: Final = {1: "2.5GT/s", 2: "5GT/s", 3: "8GT/s", 4: "16GT/s", 5: "32GT/s", 6: "64GT/s"}
_ASPM: Final = ("not supported", "L0s", "L1", "L0s L1")
_EXPRESS_TYPES: Final = {0: "Endpoint", 1: "Legacy Endpoint", 9: "Root Complex Integrated Endpoint"}
_VIRTIO: Final = {1: "CommonCfg", 2: "Notify", 3: "ISR", 4: "DeviceCfg", 5: "PciCfgAccess", 8: "SharedMemory"}
_VIRTIO_VENDOR: Final = 0x1AF4

_SIZES: Final = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))


def size_name(size: int) -> str:
    """Bytes in the largest unit that divides them: 16M."""
    return next((f"{size // unit}{name}" for unit, name in _SIZES if size and size % unit == 0), str(size))


def describe_config(config: ConfigSpace, sizes: Sequence[int]) -> list[str]:
    """The lines for a function whose regions have ``sizes``, in bytes; `client.DeviceError` for a broken
    list."""
    code = config.class_code >> 8
    name = _CLASSES.get(code, "Class")
    vendor, subsystem = config.subsystem
    return [
        f"{name} [{code:04x}]: {config.vendor:04x}:{config.device:04x} (rev {config.revision:02x})",
        *_indent(
            [
                f"Subsystem: {vendor:04x}:{subsystem:04x}",
                f"Control: {_flags(config.command, _CONTROL)}",
                f"Status: {_status(config.status)}",
                *_interrupt(config),
                *_regions(config, sizes),
                *_capabilities(config),
            ]
        ),
    ]


def _indent(lines: Iterable[str]) -> list[str]:
    return [f"\t{line}" for line in lines]


def _flag(name: str, on: int) -> str:
    return f"{name}{'+' if on else '-'}"


def _flags(value: int, names: Iterable[str]) -> str:
    """The names with + or -, the first for bit 0."""
    return " ".join(_flag(name, value >> bit & 1) for bit, name in enumerate(names))


def _bits(value: int, high: int, low: int) -> int:
    return value >> low & (1 << high - low + 1) - 1


def _status(status: int) -> str:
    select = ("fast", "medium", "slow", "??")[_bits(status, 10, 9)]
    return " ".join(
        [
            *(_flag(name, status >> bit & 1) for bit, name in ((4, "Cap"), (5, "66MHz"), (6, "UDF"))),
            *(_flag(name, status >> bit & 1) for bit, name in ((7, "FastB2B"), (8, "ParErr"))),
            f"DEVSEL={select}",
            *(_flag(name, status >> bit & 1) for bit, name in ((11, ">TAbort"), (12, "<TAbort"))),
            *(_flag(name, status >> bit & 1) for bit, name in ((13, "<MAbort"), (14, ">SERR"))),
            *(_flag(name, status >> bit & 1) for bit, name in ((15, "<PERR"), (3, "INTx"))),
        ]
    )


def _interrupt(config: ConfigSpace) -> Iterator[str]:
    if config.interrupt_pin:
        yield f"Interrupt: pin {'ABCD'[config.interrupt_pin - 1 & 3]} routed to IRQ {config.u8(0x3C)}"


def _regions(config: ConfigSpace, sizes: Sequence[int]) -> Iterator[str]:
    for bar in config.bars:
        size = sizes[bar.index] if bar.index < len(sizes) else 0
        if not size:
            continue
        if bar.io:
            kind, details = "I/O ports", ""
            where = f"{bar.address:04x}"
        else:
            kind = "Memory"
            width = "64-bit" if bar.is_64bit else "32-bit"
            details = f" ({width}, {'' if bar.prefetchable else 'non-'}prefetchable)"
            where = f"{bar.address:0{16 if bar.is_64bit and bar.address >> 32 else 8}x}"
        yield (
            f"Region {bar.index}: {kind} at {where if bar.address else '<unassigned>'}{details}"
            f" [size={size_name(size)}]"
        )


def _capabilities(config: ConfigSpace) -> Iterator[str]:
    for entry in config.capabilities:
        describe = _DESCRIBERS.get(entry.id, _unknown)
        try:
            first, *rest = describe(entry, config)
        except (struct.error, IndexError):
            first, rest = "<cut short>", []
        yield f"Capabilities: [{entry.offset:02x}] {first}"
        yield from _indent(rest)
    for entry in config.extended_capabilities:
        version = config.u16(entry.offset + 2) & 0xF
        first, *rest = _extended(entry)
        yield f"Capabilities: [{entry.offset:03x} v{version}] {first}"
        yield from _indent(rest)


def _unknown(entry: CapabilityEntry, config: ConfigSpace) -> list[str]:
    try:
        return [CapabilityId(entry.id).name]
    except ValueError:
        return [f"#{entry.id:02x}"]


def _power(entry: CapabilityEntry, config: ConfigSpace) -> list[str]:
    capabilities, control = struct.unpack_from("<HH", entry.data, 2)
    events = ",".join(
        _flag(name, capabilities >> bit & 1)
        for bit, name in enumerate(("D0", "D1", "D2", "D3hot", "D3cold"), 11)
    )
    return [
        f"Power Management version {_bits(capabilities, 2, 0)}",
        f"Flags: {_flag('PMEClk', capabilities & 1 << 3)} {_flag('DSI', capabilities & 1 << 5)}"
        f" {_flag('D1', capabilities & 1 << 9)} {_flag('D2', capabilities & 1 << 10)}"
        f" AuxCurrent={_AUX_MILLIAMPERES[_bits(capabilities, 8, 6)]}mA PME({events})",
        f"Status: D{_bits(control, 1, 0)} {_flag('NoSoftRst', control & 1 << 3)}"
        f" {_flag('PME-Enable', control & 1 << 8)} DSel={_bits(control, 12, 9)}"
        f" DScale={_bits(control, 14, 13)} {_flag('PME', control & 1 << 15)}",
    ]


def _msi(entry: CapabilityEntry, config: ConfigSpace) -> list[str]:
    (control,) = struct.unpack_from("<H", entry.data, 2)
    wide, maskable = control >> 7 & 1, control >> 8 & 1
    lines = [
        f"MSI: {_flag('Enable', control & 1)} Count={1 << _bits(control, 6, 4)}/{1 << _bits(control, 3, 1)}"
        f" {_flag('Maskable', maskable)} {_flag('64bit', wide)}"
    ]
    low, high = struct.unpack_from("<II", entry.data, 4)
    data_at = 12 if wide else 8
    (data,) = struct.unpack_from("<H", entry.data, data_at)
    lines.append(f"Address: {f'{high:08x}' if wide else ''}{low:08x}  Data: {data:04x}")
    if maskable:
        mask, pending = struct.unpack_from("<II", entry.data, data_at + 4)
        lines.append(f"Masking: {mask:08x}  Pending: {pending:08x}")
    return lines


def _msix(entry: CapabilityEntry, config: ConfigSpace) -> list[str]:
    control, table, pending = struct.unpack_from("<HII", entry.data, 2)
    return [
        f"MSI-X: {_flag('Enable', control >> 15)} Count={_bits(control, 10, 0) + 1}"
        f" {_flag('Masked', control >> 14 & 1)}",
        f"Vector table: BAR={table & 7} offset={table & ~7:08x}",
        f"PBA: BAR={pending & 7} offset={pending & ~7:08x}",
    ]


def _express(entry: CapabilityEntry, config: ConfigSpace) -> list[str]:
    flags, capability, control, status = struct.unpack_from("<HIHH", entry.data, 2)
    link, _, link_status = struct.unpack_from("<IHH", entry.data, 12)
    kind = _EXPRESS_TYPES.get(_bits(flags, 7, 4), f"type {_bits(flags, 7, 4)}")
    lines = [
        f"Express (v{_bits(flags, 3, 0)}) {kind}, MSI {_bits(flags, 13, 9):02x}",
        f"DevCap: MaxPayload {128 << _bits(capability, 2, 0)} bytes,"
        f" PhantFunc {(1 << _bits(capability, 4, 3)) - 1},"
        f" Latency L0s {_L0S[_bits(capability, 8, 6)]}, L1 {_L1[_bits(capability, 11, 9)]}",
        f"\t{_flag('ExtTag', capability & 1 << 5)} {_flag('RBE', capability & 1 << 15)}"
        f" {_flag('FLReset', capability & 1 << 28)}",
        f"DevCtl: {_flags(control, _ERRORS)}",
        f"\t{_flag('RlxdOrd', control & 1 << 4)} {_flag('ExtTag', control & 1 << 8)}"
        f" {_flag('PhantFunc', control & 1 << 9)} {_flag('AuxPwr', control & 1 << 10)}"
        f" {_flag('NoSnoop', control & 1 << 11)}",
        f"\tMaxPayload {128 << _bits(control, 7, 5)} bytes, MaxReadReq {128 << _bits(control, 14, 12)} bytes",
        f"DevSta: {_flags(status, (*_ERRORS, 'AuxPwr', 'TransPend'))}",
    ]
    if kind != "Root Complex Integrated Endpoint":  # which has no link
        lines += [
            f"LnkCap: Port #{link >> 24}, Speed {_speed(link)}, Width x{_bits(link, 9, 4)},"
            f" ASPM {_ASPM[_bits(link, 11, 10)]}",
            f"LnkSta: Speed {_speed(link_status)}, Width x{_bits(link_status, 9, 4)}",
        ]
    return lines


def _speed(value: int) -> str:
    return _SPEEDS.get(value & 0xF, "unknown")


def _vendor(entry: CapabilityEntry, config: ConfigSpace) -> list[str]:
    if config.vendor != _VIRTIO_VENDOR:
        return [f"Vendor Specific Information: Len={entry.data[2]:02x} <?>"]
    length, kind, bar, _ = struct.unpack_from("<BBBB", entry.data, 2)
    offset, size = struct.unpack_from("<II", entry.data, 8)
    line = f"BAR={bar} offset={offset:08x} size={size:08x}"
    if kind == 2 and length >= 20:
        line += f" multiplier={struct.unpack_from('<I', entry.data, 16)[0]:08x}"
    return [f"Vendor Specific Information: VirtIO: {_VIRTIO.get(kind, '<unknown>')}", line]


def _extended(entry: CapabilityEntry) -> list[str]:
    try:
        known = ExtendedCapabilityId(entry.id)
    except ValueError:
        return [f"#{entry.id:04x}"]
    if known is ExtendedCapabilityId.DSN and len(entry.data) >= 12:
        return [f"Device Serial Number {entry.data[4:12][::-1].hex('-')}"]
    return [known.name]


_DESCRIBERS: Final[dict[int, Callable[[CapabilityEntry, ConfigSpace], list[str]]]] = {
    CapabilityId.PM: _power,
    CapabilityId.MSI: _msi,
    CapabilityId.MSIX: _msix,
    CapabilityId.PCIE: _express,
    CapabilityId.VENDOR: _vendor,
}
