"""What each command asks of the PCI function: a table of handlers, one row for each command.

The engine has checked the form of a request before it comes here (lengths, flags, argsz); what depends on
the device is checked here or by the device itself. A handler answers or raises `DeviceError` with the errno
that goes into the error reply. It takes no descriptor: the device duplicates what it keeps, and whoever
called `handle` closes those of the request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from errno import EINVAL, ENOTTY, EOPNOTSUPP
from typing import Final

from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from protocol import Command, Request
from protocol.io_fds import io_fds_reply
from protocol.messages import (
    DeviceInfo,
    IoEventFd,
    IrqInfo,
    RegionAccess,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    WriteMulti,
)
from protocol.region_info import region_info_reply
from protocol.vfio import DeviceFlags, IoEventFdFlags, IrqInfoFlags, IrqSetFlags, RegionFlags
from protocol.write_multi import parse_writes
from server._answer import Answer, Handler, Terms
from server._dma import dma_map, dma_unmap
from server._features import device_feature, mig_data_read, mig_data_write

__all__ = ["HANDLERS", "handle"]

log = logging.getLogger("trionic.server")


def handle(function: PciFunction, request: Request, terms: Terms) -> Answer:
    """Do what ``request`` asks; `DeviceError` refuses it."""
    handler = HANDLERS.get(request.command)
    if handler is None:
        raise DeviceError(EOPNOTSUPP, f"{request.command.name} is not supported")
    return handler(function, request, request.body, terms)


def _get_info(function: PciFunction, request: Request, body: DeviceInfo, terms: Terms) -> Answer:
    return Answer(
        DeviceInfo(
            argsz=DeviceInfo.size,
            flags=DeviceFlags.RESET | DeviceFlags.PCI,
            num_regions=len(function.regions()),
            num_irqs=len(function.irqs()),
        )
    )


def _get_region_info(function: PciFunction, request: Request, body: RegionInfo, terms: Terms) -> Answer:
    regions = function.regions()
    if body.index >= len(regions):
        raise DeviceError(EINVAL, f"no region {body.index}")
    region = regions[body.index]
    flags = RegionFlags(0)
    if region.readable:
        flags |= RegionFlags.READ
    if region.writable:
        flags |= RegionFlags.WRITE
    mapped = terms.fds > 0 and region.fd is not None and bool(region.mmap_areas)
    if mapped:
        flags |= RegionFlags.MMAP
    whole = region.mmap_areas == ((0, region.size),)
    info, chain = region_info_reply(
        body.argsz,
        index=body.index,
        flags=flags,
        length=region.size,
        areas=region.mmap_areas if mapped and not whole else (),
    )
    return Answer(info, chain, (region.fd,) if mapped and region.fd is not None else ())


def _get_region_io_fds(function: PciFunction, request: Request, body: RegionIoFds, terms: Terms) -> Answer:
    """The eventfds that stand for writes, those that fit into one message; the others are written to."""
    fds: list[int] = []
    entries = []
    for area in function.io_eventfds(body.index):
        if area.fd not in fds:
            if len(fds) == terms.fds:
                continue
            fds.append(area.fd)
        flags = IoEventFdFlags(0) if area.datamatch is None else IoEventFdFlags.DATAMATCH
        entries.append(
            IoEventFd(area.offset, area.size, fds.index(area.fd), flags=flags, datamatch=area.datamatch or 0)
        )
    reply, data = io_fds_reply(body.argsz, body.index, entries)
    return Answer(reply, data, tuple(fds) if data else ())


def _get_irq_info(function: PciFunction, request: Request, body: IrqInfo, terms: Terms) -> Answer:
    irqs = function.irqs()
    if body.index >= len(irqs):
        raise DeviceError(EINVAL, f"no interrupt index {body.index}")
    irq = irqs[body.index]
    return Answer(IrqInfo(IrqInfo.size, IrqInfoFlags(int(irq.flags)), body.index, irq.count))


def _set_irqs(function: PciFunction, request: Request, body: SetIrqs, terms: Terms) -> Answer:
    flags = body.flags
    if flags & IrqSetFlags.DATA_EVENTFD:
        _set_irq_fds(function, body, request.fds)
        return Answer()
    if body.count == 0:
        if flags != IrqSetFlags.DATA_NONE | IrqSetFlags.ACTION_TRIGGER or body.start:
            raise DeviceError(EINVAL, f"SET_IRQS flags {int(flags):#x} for no interrupt at {body.start}")
        function.irq_disable(body.index)
        return Answer()
    which = [byte != 0 for byte in request.data] if flags & IrqSetFlags.DATA_BOOL else [True] * body.count
    if flags & IrqSetFlags.ACTION_MASK:
        function.irq_mask(body.index, body.start, which)
    elif flags & IrqSetFlags.ACTION_UNMASK:
        function.irq_unmask(body.index, body.start, which)
    else:
        function.irq_trigger(body.index, body.start, which)
    return Answer()


def _set_irq_fds(function: PciFunction, body: SetIrqs, fds: Sequence[int]) -> None:
    if body.count == 0:
        raise DeviceError(EINVAL, "SET_IRQS with event descriptors for no interrupt")
    wanted: Sequence[int | None] = fds or [None] * body.count  # none at all: take the old ones away
    if body.flags & IrqSetFlags.ACTION_TRIGGER:
        function.irq_set_trigger(body.index, body.start, wanted)
    elif body.flags & IrqSetFlags.ACTION_UNMASK:
        if body.start or body.count != 1:
            raise DeviceError(EINVAL, "an index has one event descriptor that unmasks it")
        function.irq_set_unmask_fd(body.index, wanted[0])
    else:
        # As the kernel (vfio_pci_set_intx_mask): nobody has ever had a use for it.
        raise DeviceError(ENOTTY, "SET_IRQS with an event descriptor that masks")


def _region_read(function: PciFunction, request: Request, body: RegionAccess, terms: Terms) -> Answer:
    return Answer(body, function.region_read(body.region, body.offset, body.count))


def _region_write(function: PciFunction, request: Request, body: RegionAccess, terms: Terms) -> Answer:
    function.region_write(body.region, body.offset, request.data)
    return Answer(body)


def _region_write_multi(function: PciFunction, request: Request, body: WriteMulti, terms: Terms) -> Answer:
    """Write one after the other until one fails. The reply tells how many were done; if none was, why."""
    done = 0
    for region, offset, data in parse_writes(body, request.data):
        try:
            function.region_write(region, offset, data)
        except DeviceError as error:
            if done == 0:
                raise
            log.debug("%s: write %d of %d refused: %s", function.name, done + 1, body.wr_cnt, error)
            break
        done += 1
    return Answer(WriteMulti(done))


def _device_reset(function: PciFunction, request: Request, body: None, terms: Terms) -> Answer:
    function.reset(ResetKind.DEVICE)
    return Answer()


HANDLERS: Final[dict[Command, Handler]] = {
    Command.DMA_MAP: dma_map,
    Command.DMA_UNMAP: dma_unmap,
    Command.DEVICE_GET_INFO: _get_info,
    Command.DEVICE_GET_REGION_INFO: _get_region_info,
    Command.DEVICE_GET_REGION_IO_FDS: _get_region_io_fds,
    Command.DEVICE_GET_IRQ_INFO: _get_irq_info,
    Command.DEVICE_SET_IRQS: _set_irqs,
    Command.REGION_READ: _region_read,
    Command.REGION_WRITE: _region_write,
    Command.REGION_WRITE_MULTI: _region_write_multi,
    Command.DEVICE_RESET: _device_reset,
    Command.DEVICE_FEATURE: device_feature,
    Command.MIG_DATA_READ: mig_data_read,
    Command.MIG_DATA_WRITE: mig_data_write,
}
