"""What each request must satisfy beyond its shape, a function per command: it gives the reason of a
refusal, or None.

All refusals are EINVAL. What depends on the device (does the region exist, is the window free) is the
server's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from protocol.commands import Command
from protocol.errors import RemoteProtocolError
from protocol.features import bitmap_size, check_bitmap, check_feature, check_feature_reply
from protocol.limits import ADDRESS_SPACE, MAX_IO_FDS, MAX_IRQS_PER_SET
from protocol.messages import (
    Bitmap,
    DeviceFeature,
    DeviceInfo,
    DmaAccess,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    MigData,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    WriteMulti,
)
from protocol.vfio import IRQ_SET_ACTION, IRQ_SET_DATA, DmaUnmapFlags, IrqSetFlags
from protocol.write_multi import parse_writes

Check = Callable[[Any, bytes, int, int], str | None]
"""(record, bytes after it, descriptors, largest transfer) to the reason of a refusal."""


def _argsz(
    body: DeviceInfo | RegionInfo | RegionIoFds | IrqInfo | DmaMap | DmaUnmap | SetIrqs,
) -> str | None:
    if body.argsz < body.size:
        return f"argsz is {body.argsz}, less than the {body.size} bytes of {type(body).__name__}"
    return None


def _info(body: DeviceInfo | RegionInfo | IrqInfo, data: bytes, fds: int, most: int) -> str | None:
    return _argsz(body)


def _dma_map(body: DmaMap, data: bytes, fds: int, most: int) -> str | None:
    if fds > 1:
        return f"DMA_MAP with {fds} descriptors"
    if body.length == 0 or body.length > ADDRESS_SPACE - body.address:
        return f"DMA window {body.address:#x}+{body.length:#x} is empty or wraps"
    if body.length > ADDRESS_SPACE - body.offset:
        return f"DMA window at offset {body.offset:#x}+{body.length:#x} of its descriptor wraps"
    return _argsz(body)


def _dma_unmap(body: DmaUnmap, data: bytes, fds: int, most: int) -> str | None:
    if body.length > ADDRESS_SPACE - body.address:
        return f"DMA window {body.address:#x}+{body.length:#x} wraps"
    if body.flags & DmaUnmapFlags.GET_DIRTY_BITMAP:
        return _unmap_bitmap(body, data, most)
    return _argsz(body)


def _unmap_bitmap(body: DmaUnmap, data: bytes, most: int) -> str | None:
    """As the kernel has it (vfio_iommu_type1_unmap_dma), but for the limit."""
    if body.flags & DmaUnmapFlags.ALL:
        return "DMA_UNMAP of everything with a dirty bitmap"
    if len(data) < Bitmap.size:
        return f"DMA_UNMAP with {len(data)} bytes about its dirty bitmap"
    bitmap = Bitmap.decode(data)
    reason = check_bitmap(body.address, body.length, bitmap.page_size, most)
    if reason is not None:
        return reason
    needed = bitmap_size(body.length, bitmap.page_size)
    if not needed <= bitmap.length <= most:
        return f"DMA_UNMAP with a dirty bitmap of {bitmap.length} bytes, not {needed}"
    if body.argsz < DmaUnmap.size + Bitmap.size + bitmap.length:
        return f"DMA_UNMAP argsz is {body.argsz}, no room for {bitmap.length} bytes of dirty bitmap"
    return None


def _set_irqs(body: SetIrqs, data: bytes, fds: int, most: int) -> str | None:
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
        if len(data) != body.count:
            return f"SET_IRQS with {len(data)} booleans for {body.count} interrupts"
    elif kind == IrqSetFlags.DATA_EVENTFD and fds not in (0, body.count):
        return f"SET_IRQS with {fds} descriptors for {body.count} interrupts"
    if fds and kind != IrqSetFlags.DATA_EVENTFD:
        return "SET_IRQS with descriptors that it has no use for"
    return _argsz(body)


def _region_read(body: RegionAccess, data: bytes, fds: int, most: int) -> str | None:
    return _span("REGION_READ", body.offset, body.count, most)


def _region_write(body: RegionAccess, data: bytes, fds: int, most: int) -> str | None:
    if len(data) != body.count:
        return f"REGION_WRITE of {body.count} bytes carries {len(data)}"
    return _span("REGION_WRITE", body.offset, body.count, most)


def _dma_read(body: DmaAccess, data: bytes, fds: int, most: int) -> str | None:
    return _span("DMA_READ", body.address, body.count, most)


def _dma_write(body: DmaAccess, data: bytes, fds: int, most: int) -> str | None:
    if len(data) != body.count:
        return f"DMA_WRITE of {body.count} bytes carries {len(data)}"
    return _span("DMA_WRITE", body.address, body.count, most)


def _span(name: str, start: int, count: int, most: int) -> str | None:
    if count > most:
        return f"{name} of {count} bytes, more than max_data_xfer_size {most}"
    if count > ADDRESS_SPACE - start:
        return f"{name} of {start:#x}+{count:#x} wraps"
    return None


def _io_fds(body: RegionIoFds, data: bytes, fds: int, most: int) -> str | None:
    if body.flags or body.count:
        return f"GET_REGION_IO_FDS with flags {body.flags:#x} and count {body.count}"
    return _argsz(body)


def _write_multi(body: WriteMulti, data: bytes, fds: int, most: int) -> str | None:
    try:
        parse_writes(body, data)
    except RemoteProtocolError as error:
        return error.reason
    return None


def _feature(body: DeviceFeature, data: bytes, fds: int, most: int) -> str | None:
    return check_feature(body, data, most)


def _mig_read(body: MigData, data: bytes, fds: int, most: int) -> str | None:
    if body.length > most:
        return f"MIG_DATA_READ of {body.length} bytes, more than max_data_xfer_size {most}"
    if body.argsz < MigData.size + body.length:
        return f"MIG_DATA_READ argsz is {body.argsz}, no room for {body.length} bytes"
    return None


def _mig_write(body: MigData, data: bytes, fds: int, most: int) -> str | None:
    if body.length > most:
        return f"MIG_DATA_WRITE of {body.length} bytes, more than max_data_xfer_size {most}"
    if len(data) != body.length:
        return f"MIG_DATA_WRITE of {body.length} bytes carries {len(data)}"
    return None


REQUEST_CHECKS: Final[dict[int, Check]] = {
    Command.DMA_MAP: _dma_map,
    Command.DMA_UNMAP: _dma_unmap,
    Command.DEVICE_GET_INFO: _info,
    Command.DEVICE_GET_REGION_INFO: _info,
    Command.DEVICE_GET_REGION_IO_FDS: _io_fds,
    Command.DEVICE_GET_IRQ_INFO: _info,
    Command.DEVICE_SET_IRQS: _set_irqs,
    Command.REGION_READ: _region_read,
    Command.REGION_WRITE: _region_write,
    Command.DMA_READ: _dma_read,
    Command.DMA_WRITE: _dma_write,
    Command.REGION_WRITE_MULTI: _write_multi,
    Command.DEVICE_FEATURE: _feature,
    Command.MIG_DATA_READ: _mig_read,
    Command.MIG_DATA_WRITE: _mig_write,
}

ReplyCheck = Callable[[Any, bytes, Any, bytes], str | None]
"""(record asked with, bytes after it, record of the answer, bytes after it) to the reason why that is
nonsense. What was sent after the record is kept for `KEPT_DATA` alone.
"""

KEPT_DATA: Final = frozenset({int(Command.DMA_UNMAP), int(Command.DEVICE_FEATURE)})


def _read_reply(asked: RegionAccess, sent: bytes, body: RegionAccess, data: bytes) -> str | None:
    if (body.offset, body.region) != (asked.offset, asked.region):
        return f"REGION_READ of {asked.pretty()} answered for {body.pretty()}"
    if body.count > asked.count or len(data) != body.count:
        return f"REGION_READ of {asked.count} bytes answered with {len(data)}, said to be {body.count}"
    return None


def _write_reply(asked: RegionAccess, sent: bytes, body: RegionAccess, data: bytes) -> str | None:
    if (body.offset, body.region) != (asked.offset, asked.region):
        return f"REGION_WRITE of {asked.pretty()} answered for {body.pretty()}"
    if body.count > asked.count:
        return f"REGION_WRITE of {asked.count} bytes answered for {body.count}"
    return None


def _dma_read_reply(asked: DmaAccess, sent: bytes, body: DmaAccess, data: bytes) -> str | None:
    if body.address != asked.address:
        return f"DMA_READ of {asked.pretty()} answered for {body.pretty()}"
    if body.count > asked.count or len(data) != body.count:
        return f"DMA_READ of {asked.count} bytes answered with {len(data)}, said to be {body.count}"
    return None


def _dma_write_reply(asked: DmaAccess, sent: bytes, body: DmaAccess, data: bytes) -> str | None:
    if body.address != asked.address or body.count > asked.count:
        return f"DMA_WRITE of {asked.pretty()} answered for {body.pretty()}"
    return None


def _unmap_reply(asked: DmaUnmap, sent: bytes, body: DmaUnmap, data: bytes) -> str | None:
    if (body.address, body.length) != (asked.address, asked.length):
        return f"DMA_UNMAP of {asked.pretty()} answered for {body.pretty()}"
    if asked.flags & DmaUnmapFlags.GET_DIRTY_BITMAP:
        bitmap = Bitmap.decode(sent)
        if data[: Bitmap.size] != sent[: Bitmap.size] or len(data) != Bitmap.size + bitmap.length:
            return f"DMA_UNMAP with a dirty bitmap of {bitmap.length} bytes answered with {len(data)}"
    return None


def _irq_info_reply(asked: IrqInfo, sent: bytes, body: IrqInfo, data: bytes) -> str | None:
    if body.index != asked.index:
        return f"GET_IRQ_INFO of index {asked.index} answered for {body.index}"
    return None


def _io_fds_reply(asked: RegionIoFds, sent: bytes, body: RegionIoFds, data: bytes) -> str | None:
    if body.index != asked.index or body.count > MAX_IO_FDS:
        return f"GET_REGION_IO_FDS of {asked.index} answered with {body.count} for {body.index}"
    return None


def _multi_reply(asked: WriteMulti, sent: bytes, body: WriteMulti, data: bytes) -> str | None:
    if body.wr_cnt > asked.wr_cnt:
        return f"REGION_WRITE_MULTI of {asked.wr_cnt} writes answered with {body.wr_cnt}"
    return None


def _mig_read_reply(asked: MigData, sent: bytes, body: MigData, data: bytes) -> str | None:
    if body.length > asked.length or len(data) < body.length:
        return f"MIG_DATA_READ of {asked.length} bytes answered with {len(data)}, said to be {body.length}"
    return None


REPLY_CHECKS: Final[dict[int, ReplyCheck]] = {
    Command.DMA_UNMAP: _unmap_reply,
    Command.DEVICE_GET_REGION_IO_FDS: _io_fds_reply,
    Command.DEVICE_GET_IRQ_INFO: _irq_info_reply,
    Command.REGION_READ: _read_reply,
    Command.REGION_WRITE: _write_reply,
    Command.DMA_READ: _dma_read_reply,
    Command.DMA_WRITE: _dma_write_reply,
    Command.REGION_WRITE_MULTI: _multi_reply,
    Command.DEVICE_FEATURE: check_feature_reply,
    Command.MIG_DATA_READ: _mig_read_reply,
}
