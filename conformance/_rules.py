"""What each command of a client must look like, held against the device and what was agreed on."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from conformance._memory import PAGE
from conformance._messages import Message, announced
from conformance._notes import Notes
from conformance._tiny_device import TinyDevice
from conformance.checks import Failed
from protocol import Command, Limits, Role, command_name
from protocol.commands import SHAPES
from protocol.messages import (
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    HeaderFlags,
    IrqInfo,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    WriteMulti,
    WriteMultiEntry,
)
from protocol.vfio import (
    IRQ_SET_ACTION,
    IRQ_SET_DATA,
    DmaMapFlags,
    DmaUnmapFlags,
    IrqInfoFlags,
    IrqSetFlags,
)

ADDRESS_SPACE: Final = 1 << 64
DEFINED_FLAGS: Final = 0xF | int(HeaderFlags.NO_REPLY | HeaderFlags.ERROR)
KINDS: Final = {
    "max_msg_fds": int,
    "max_data_xfer_size": int,
    "max_dma_maps": int,
    "pgsizes": int,
    "write_multiple": bool,
    "twin_socket": dict,
    "migration": dict,
}


@dataclass(frozen=True, slots=True)
class ClientWindow:
    """A window of the client's; `fd` is ours to close, -1 without a descriptor."""

    address: int
    length: int
    offset: int
    flags: DmaMapFlags
    fd: int


@dataclass(slots=True)
class Situation:
    """What a command is held against."""

    notes: Notes
    device: TinyDevice
    limits: Limits
    windows: dict[int, ClientWindow] = field(default_factory=dict)
    multiple: bool = False
    """write_multiple was agreed on."""
    cut: dict[int, int] = field(default_factory=dict)
    """Regions whose description did not fit: what it takes."""

    def judge(self, name: str, good: object, expected: str, came: object) -> bool:
        """See `Notes.judge`."""
        return self.notes.judge(name, good, expected, came)


def check_command(situation: Situation, message: Message) -> None:
    """Hold a command, but VERSION, against the rules; it is not carried out."""
    judge = situation.judge
    judge("client-header.reserved", message.error == 0, "error 0", message.error)
    undefined = message.flags & ~DEFINED_FLAGS
    judge("client-header.reserved", not undefined, "no undefined flags", hex(message.flags))
    shape = SHAPES.get(message.command)
    own = shape is not None and shape.sender is Role.CLIENT and message.command != Command.VERSION
    known = command_name(message.command)
    judge("client-version.once", message.command != Command.VERSION, "one VERSION", "a second one")
    if message.command != Command.VERSION:
        judge("client-header.own-commands", own, "a command of clients", known)
    fds = len(message.fds)
    most = situation.limits.max_msg_fds
    judge("client-header.descriptors", fds <= most, f"at most {most} descriptors", fds)
    if shape is None or not own:
        return
    needed = shape.request.size
    size = len(message.payload)
    if judge("client-header.size", size >= needed, f"{needed} bytes of {known}", size):
        rule = _RULES.get(Command(message.command))
        if rule is not None and shape.request.record is not None:
            body = shape.request.record.decode(message.payload)
            rule(situation, message, body, message.payload[needed:])


def check_version(notes: Notes, message: Message) -> None:
    """Hold a client's first message against the rules."""
    first = notes.judge(
        "client-version.first", message.command == Command.VERSION, "VERSION", command_name(message.command)
    )
    if not first:
        return
    whole = len(message.payload) >= 4
    notes.judge("client-version.payload", whole, "at least 4 bytes", len(message.payload))
    try:
        capabilities = announced(message.payload)
    except Failed as failure:
        notes.judge("client-version.payload", False, failure.expected, failure.came)
        return
    for name, kind in KINDS.items():
        if name in capabilities:
            value = capabilities[name]
            good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            notes.judge("client-version.kinds", good, f"{name} as {kind.__name__}", repr(value))


def _device_info(situation: Situation, message: Message, body: DeviceInfo, data: bytes) -> None:
    situation.judge("client-info.argsz", body.argsz >= body.size, "argsz 16 or more", body.argsz)
    rest = (int(body.flags), body.num_regions, body.num_irqs)
    situation.judge("client-info.zero", not any(rest), "zeros", body.pretty())


def _region_info(situation: Situation, message: Message, body: RegionInfo, data: bytes) -> None:
    situation.judge("client-info.argsz", body.argsz >= body.size, "argsz 32 or more", body.argsz)
    rest = (int(body.flags), body.cap_offset, body.length, body.offset)
    situation.judge("client-info.zero", not any(rest), "zeros", body.pretty())
    _index(situation, body.index, len(situation.device.regions))
    if body.index in situation.cut and body.argsz >= situation.cut[body.index]:
        del situation.cut[body.index]
        situation.judge("client-info.more-room", True, "", "")


def _io_fds(situation: Situation, message: Message, body: RegionIoFds, data: bytes) -> None:
    situation.judge("client-info.argsz", body.argsz >= body.size, "argsz 16 or more", body.argsz)
    situation.judge("client-info.zero", not body.flags and not body.count, "zeros", body.pretty())
    _index(situation, body.index, len(situation.device.regions))


def _irq_info(situation: Situation, message: Message, body: IrqInfo, data: bytes) -> None:
    situation.judge("client-info.argsz", body.argsz >= body.size, "argsz 16 or more", body.argsz)
    situation.judge("client-info.zero", not int(body.flags) and not body.count, "zeros", body.pretty())
    _index(situation, body.index, len(situation.device.irqs))


def _index(situation: Situation, index: int, count: int) -> None:
    situation.judge("client-info.index", index < count, f"an index below {count}", index)


def _dma_map(situation: Situation, message: Message, body: DmaMap, data: bytes) -> None:
    judge, told = situation.judge, body.pretty()
    judge("client-dma-map.argsz", body.argsz == body.size, "argsz 32", body.argsz)
    both = DmaMapFlags.READ | DmaMapFlags.WRITE
    judge("client-dma-map.flags", body.flags and not int(body.flags) & ~int(both), "1, 2 or 3", told)
    inside = 0 < body.length <= ADDRESS_SPACE - body.address
    judge("client-dma-map.range", inside, "a window within the address space", told)
    whole = (body.address | body.length) & (_smallest_page(situation) - 1) == 0
    judge("client-dma-map.aligned", whole, "whole pages", told)
    end = body.address + body.length
    free = all(
        end <= each.address or body.address >= each.address + each.length
        for each in situation.windows.values()
    )
    judge("client-dma-map.overlap", free, "an address where no window is", told)
    most = situation.limits.max_dma_maps
    judge("client-dma-map.count", len(situation.windows) < most, f"at most {most} windows", "one more")
    judge("client-dma-map.descriptor", len(message.fds) <= 1, "one descriptor or none", len(message.fds))
    if not message.fds:
        judge("client-dma-map.offset", body.offset == 0, "offset 0 without a descriptor", told)
        return
    status = os.fstat(message.fds[0])
    if stat.S_ISREG(status.st_mode):
        covered = body.offset + body.length <= status.st_size
        judge("client-dma-map.covered", covered, f"a window within {status.st_size:#x} bytes", told)


def _smallest_page(situation: Situation) -> int:
    return situation.limits.pgsizes & -situation.limits.pgsizes or PAGE


def _dma_unmap(situation: Situation, message: Message, body: DmaUnmap, data: bytes) -> None:
    judge, told = situation.judge, body.pretty()
    judge("client-dma-unmap.argsz", body.argsz >= body.size, "argsz 24 or more", body.argsz)
    known = int(DmaUnmapFlags.ALL | DmaUnmapFlags.GET_DIRTY_BITMAP)
    judge("client-dma-unmap.flags", not int(body.flags) & ~known, "flags 0", told)
    if DmaUnmapFlags.ALL not in body.flags:
        window = situation.windows.get(body.address)
        exact = window is not None and window.length == body.length
        judge("client-dma-unmap.exact", exact, "a window that is there", told)


def _set_irqs(situation: Situation, message: Message, body: SetIrqs, data: bytes) -> None:
    judge, told = situation.judge, body.pretty()
    judge("client-set-irqs.argsz", body.argsz == len(message.payload), "argsz of record and data", told)
    kind, action = body.flags & IRQ_SET_DATA, body.flags & IRQ_SET_ACTION
    one_each = kind.bit_count() == 1 and action.bit_count() == 1
    judge("client-set-irqs.flags", one_each, "one DATA flag and one ACTION flag", told)
    irqs = situation.device.irqs
    irq = irqs[body.index] if body.index < len(irqs) else IrqInfo(IrqInfo.size)
    judge("client-set-irqs.range", body.start + body.count <= irq.count, f"{irq.count} interrupts", told)
    if kind == IrqSetFlags.DATA_EVENTFD:
        good = len(message.fds) in (0, body.count)
        judge("client-set-irqs.descriptors", good, f"{body.count} descriptors", len(message.fds))
    if kind == IrqSetFlags.DATA_BOOL:
        judge("client-set-irqs.booleans", len(data) == body.count, f"{body.count} booleans", len(data))
    if action in (IrqSetFlags.ACTION_MASK, IrqSetFlags.ACTION_UNMASK):
        judge("client-set-irqs.maskable", IrqInfoFlags.MASKABLE in irq.flags, "MASKABLE", told)


def _access(situation: Situation, body: RegionAccess) -> None:
    inside = situation.device.holds(body.region, body.offset, body.count)
    situation.judge("client-region.bounds", inside, "bytes that a region has", body.pretty())
    most = situation.limits.max_data_xfer_size
    situation.judge("client-region.size", body.count <= most, f"at most {most} bytes", body.pretty())


def _region_read(situation: Situation, message: Message, body: RegionAccess, data: bytes) -> None:
    _access(situation, body)
    situation.judge("client-header.size", not data, "16 bytes of REGION_READ", f"{len(data)} more")


def _region_write(situation: Situation, message: Message, body: RegionAccess, data: bytes) -> None:
    _access(situation, body)
    situation.judge("client-region.data", len(data) == body.count, f"{body.count} bytes", len(data))


def _write_multi(situation: Situation, message: Message, body: WriteMulti, data: bytes) -> None:
    judge = situation.judge
    judge("client-region.multiple-agreed", situation.multiple, "write_multiple agreed", "REGION_WRITE_MULTI")
    whole = len(data) == body.wr_cnt * WriteMultiEntry.size
    if not judge("client-region.multiple-form", whole, f"{body.wr_cnt} writes", f"{len(data)} bytes"):
        return
    for at in range(0, len(data), WriteMultiEntry.size):
        entry = WriteMultiEntry.decode(data, at)
        judge("client-region.multiple-form", entry.count <= 8, "at most 8 bytes", entry.pretty())
        _access(situation, RegionAccess(entry.offset, entry.region, entry.count))


_RULES: Final[dict[Command, Callable[[Situation, Message, Any, bytes], None]]] = {
    Command.DMA_MAP: _dma_map,
    Command.DMA_UNMAP: _dma_unmap,
    Command.DEVICE_GET_INFO: _device_info,
    Command.DEVICE_GET_REGION_INFO: _region_info,
    Command.DEVICE_GET_REGION_IO_FDS: _io_fds,
    Command.DEVICE_GET_IRQ_INFO: _irq_info,
    Command.DEVICE_SET_IRQS: _set_irqs,
    Command.REGION_READ: _region_read,
    Command.REGION_WRITE: _region_write,
    Command.REGION_WRITE_MULTI: _write_multi,
}
