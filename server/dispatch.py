"""What each command asks of the PCI function: a table of handlers, one row for each command.

The engine has checked the form of a request before it comes here (lengths, flags, argsz); what depends on
the device is checked here or by the device itself. A handler answers or raises `DeviceError` with the errno
that goes into the error reply. It takes no descriptor: the device duplicates what it keeps, and whoever
called `handle` closes those of the request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from errno import EINVAL, ENOTTY, EOPNOTSUPP
from typing import Any, Final

from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from protocol import Command, Request
from protocol.messages import DeviceInfo, DmaMap, DmaUnmap, IrqInfo, Record, RegionAccess, RegionInfo, SetIrqs
from protocol.region_info import region_info_reply
from protocol.vfio import DeviceFlags, DmaMapFlags, DmaUnmapFlags, IrqInfoFlags, IrqSetFlags, RegionFlags

__all__ = ["HANDLERS", "Answer", "handle"]

# Plain numbers, because the complement of an IntFlag has none of the bits that no member names.
_DMA_PROTECTION: Final = int(DmaMapFlags.READ | DmaMapFlags.WRITE)
_UNMAP_ALL: Final = int(DmaUnmapFlags.ALL)


@dataclass(frozen=True, slots=True)
class Answer:
    """The content of a reply. `fds` stay the device's: they are sent, not given away."""

    body: Record | None = None
    data: bytes = b""
    fds: tuple[int, ...] = ()


def handle(function: PciFunction, request: Request, *, send_fds: bool) -> Answer:
    """Do what ``request`` asks; `DeviceError` refuses it.

    ``send_fds``: the client takes descriptors. One that does not is offered no mapping, only messages.
    """
    handler = HANDLERS.get(request.command)
    if handler is None:
        raise DeviceError(EOPNOTSUPP, f"{request.command.name} is not supported")
    return handler(function, request, request.body, send_fds)


def _dma_map(function: PciFunction, request: Request, body: DmaMap, send_fds: bool) -> Answer:
    if int(body.flags) & ~_DMA_PROTECTION:
        # The other bits choose ways to reach the memory that this server does not know: to ignore them
        # would be to map something else than was meant.
        raise DeviceError(EINVAL, f"DMA_MAP flags {int(body.flags):#x}")
    fd = request.fds[0] if request.fds else None
    with function.gate:
        function.dma.map(body.address, body.length, int(body.flags), fd, body.offset if request.fds else 0)
    return Answer()


def _dma_unmap(function: PciFunction, request: Request, body: DmaUnmap, send_fds: bool) -> Answer:
    if int(body.flags) & ~_UNMAP_ALL:
        raise DeviceError(EOPNOTSUPP, f"DMA_UNMAP flags {int(body.flags):#x}: no dirty bitmap is kept")
    if body.flags & _UNMAP_ALL:
        if body.address or body.length:
            raise DeviceError(EINVAL, "DMA_UNMAP of everything with an address or a size")
        with function.gate:
            function.dma.unmap_all()
    else:
        with function.gate:
            function.dma.unmap(body.address, body.length)
    return Answer(replace(body, argsz=DmaUnmap.size))


def _get_info(function: PciFunction, request: Request, body: DeviceInfo, send_fds: bool) -> Answer:
    return Answer(
        DeviceInfo(
            argsz=DeviceInfo.size,
            flags=DeviceFlags.RESET | DeviceFlags.PCI,
            num_regions=len(function.regions()),
            num_irqs=len(function.irqs()),
        )
    )


def _get_region_info(function: PciFunction, request: Request, body: RegionInfo, send_fds: bool) -> Answer:
    regions = function.regions()
    if body.index >= len(regions):
        raise DeviceError(EINVAL, f"no region {body.index}")
    region = regions[body.index]
    flags = RegionFlags(0)
    if region.readable:
        flags |= RegionFlags.READ
    if region.writable:
        flags |= RegionFlags.WRITE
    mapped = send_fds and region.fd is not None and bool(region.mmap_areas)
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


def _get_irq_info(function: PciFunction, request: Request, body: IrqInfo, send_fds: bool) -> Answer:
    irqs = function.irqs()
    if body.index >= len(irqs):
        raise DeviceError(EINVAL, f"no interrupt index {body.index}")
    irq = irqs[body.index]
    return Answer(IrqInfo(IrqInfo.size, IrqInfoFlags(int(irq.flags)), body.index, irq.count))


def _set_irqs(function: PciFunction, request: Request, body: SetIrqs, send_fds: bool) -> Answer:
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


def _region_read(function: PciFunction, request: Request, body: RegionAccess, send_fds: bool) -> Answer:
    return Answer(body, function.region_read(body.region, body.offset, body.count))


def _region_write(function: PciFunction, request: Request, body: RegionAccess, send_fds: bool) -> Answer:
    function.region_write(body.region, body.offset, request.data)
    return Answer(body)


def _device_reset(function: PciFunction, request: Request, body: None, send_fds: bool) -> Answer:
    function.reset(ResetKind.DEVICE)
    return Answer()


HANDLERS: Final[dict[Command, Callable[[PciFunction, Request, Any, bool], Answer]]] = {
    Command.DMA_MAP: _dma_map,
    Command.DMA_UNMAP: _dma_unmap,
    Command.DEVICE_GET_INFO: _get_info,
    Command.DEVICE_GET_REGION_INFO: _get_region_info,
    Command.DEVICE_GET_IRQ_INFO: _get_irq_info,
    Command.DEVICE_SET_IRQS: _set_irqs,
    Command.REGION_READ: _region_read,
    Command.REGION_WRITE: _region_write,
    Command.DEVICE_RESET: _device_reset,
}
