"""What each request must satisfy beyond its shape, a function per command: it gives the reason of a
refusal, or None.

All refusals are EINVAL. What depends on the device (does the region exist, is the window free) is the
server's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from protocol.commands import Command
from protocol.limits import MAX_IRQS_PER_SET
from protocol.messages import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, RegionAccess, RegionInfo, SetIrqs
from protocol.vfio import IRQ_SET_ACTION, IRQ_SET_DATA, IrqSetFlags

ADDRESS_SPACE: Final = 1 << 64
"""IOVAs and region offsets are below; a span that ends beyond would wrap at the other end."""

Check = Callable[[Any, int, int, int], str | None]
"""(record, bytes after it, descriptors, max_data_xfer_size) to the reason of a refusal."""


def _argsz(body: DeviceInfo | RegionInfo | IrqInfo | DmaMap | DmaUnmap | SetIrqs) -> str | None:
    if body.argsz < body.size:
        return f"argsz is {body.argsz}, less than the {body.size} bytes of {type(body).__name__}"
    return None


def _info(body: DeviceInfo | RegionInfo | IrqInfo, data: int, fds: int, most: int) -> str | None:
    return _argsz(body)


def _dma_map(body: DmaMap, data: int, fds: int, most: int) -> str | None:
    if fds > 1:
        return f"DMA_MAP with {fds} descriptors"
    if body.length == 0 or body.length > ADDRESS_SPACE - body.address:
        return f"DMA window {body.address:#x}+{body.length:#x} is empty or wraps"
    if body.length > ADDRESS_SPACE - body.offset:
        return f"DMA window at offset {body.offset:#x}+{body.length:#x} of its descriptor wraps"
    return _argsz(body)


def _dma_unmap(body: DmaUnmap, data: int, fds: int, most: int) -> str | None:
    if body.length > ADDRESS_SPACE - body.address:
        return f"DMA window {body.address:#x}+{body.length:#x} wraps"
    return _argsz(body)


def _set_irqs(body: SetIrqs, data: int, fds: int, most: int) -> str | None:
    kind = body.flags & IRQ_SET_DATA
    action = body.flags & IRQ_SET_ACTION
    if (
        kind.bit_count() != 1
        or action.bit_count() != 1
        or int(body.flags) & ~int(IRQ_SET_DATA | IRQ_SET_ACTION)
    ):
        return f"SET_IRQS flags {int(body.flags):#x} are not one kind of data and one action"
    if body.count > MAX_IRQS_PER_SET or body.start > (1 << 32) - 1 - body.count:
        return f"SET_IRQS of {body.count} interrupts from {body.start}"
    if kind == IrqSetFlags.DATA_BOOL:
        if data != body.count:
            return f"SET_IRQS with {data} booleans for {body.count} interrupts"
    elif kind == IrqSetFlags.DATA_EVENTFD and fds not in (0, body.count):
        return f"SET_IRQS with {fds} descriptors for {body.count} interrupts"
    if fds and kind != IrqSetFlags.DATA_EVENTFD:
        return "SET_IRQS with descriptors that it has no use for"
    return _argsz(body)


def _region_read(body: RegionAccess, data: int, fds: int, most: int) -> str | None:
    if body.count > most:
        return f"REGION_READ of {body.count} bytes, more than max_data_xfer_size {most}"
    if body.count > ADDRESS_SPACE - body.offset:
        return f"REGION_READ of {body.offset:#x}+{body.count:#x} wraps"
    return None


def _region_write(body: RegionAccess, data: int, fds: int, most: int) -> str | None:
    if body.count > most:
        return f"REGION_WRITE of {body.count} bytes, more than max_data_xfer_size {most}"
    if data != body.count:
        return f"REGION_WRITE of {body.count} bytes carries {data}"
    if body.count > ADDRESS_SPACE - body.offset:
        return f"REGION_WRITE of {body.offset:#x}+{body.count:#x} wraps"
    return None


REQUEST_CHECKS: Final[dict[int, Check]] = {
    Command.DMA_MAP: _dma_map,
    Command.DMA_UNMAP: _dma_unmap,
    Command.DEVICE_GET_INFO: _info,
    Command.DEVICE_GET_REGION_INFO: _info,
    Command.DEVICE_GET_IRQ_INFO: _info,
    Command.DEVICE_SET_IRQS: _set_irqs,
    Command.REGION_READ: _region_read,
    Command.REGION_WRITE: _region_write,
}


def _read_reply(asked: RegionAccess, body: RegionAccess, data: int) -> str | None:
    if (body.offset, body.region) != (asked.offset, asked.region):
        return f"REGION_READ of {asked.pretty()} answered for {body.pretty()}"
    if body.count > asked.count or data != body.count:
        return f"REGION_READ of {asked.count} bytes answered with {data}, said to be {body.count}"
    return None


def _write_reply(asked: RegionAccess, body: RegionAccess, data: int) -> str | None:
    if (body.offset, body.region) != (asked.offset, asked.region):
        return f"REGION_WRITE of {asked.pretty()} answered for {body.pretty()}"
    if body.count > asked.count:
        return f"REGION_WRITE of {asked.count} bytes answered for {body.count}"
    return None


def _unmap_reply(asked: DmaUnmap, body: DmaUnmap, data: int) -> str | None:
    if (body.address, body.length) != (asked.address, asked.length):
        return f"DMA_UNMAP of {asked.pretty()} answered for {body.pretty()}"
    return None


def _irq_info_reply(asked: IrqInfo, body: IrqInfo, data: int) -> str | None:
    if body.index != asked.index:
        return f"GET_IRQ_INFO of index {asked.index} answered for {body.index}"
    return None


REPLY_CHECKS: Final[dict[int, Callable[[Any, Any, int], str | None]]] = {
    Command.DMA_UNMAP: _unmap_reply,
    Command.DEVICE_GET_IRQ_INFO: _irq_info_reply,
    Command.REGION_READ: _read_reply,
    Command.REGION_WRITE: _write_reply,
}
