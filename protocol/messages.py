"""Every message of vfio-user, declared once (QEMU docs/interop/vfio-user.rst; offsets there count from the
end of the header).

A record is the fixed part. What may follow it (JSON, region data, IRQ booleans, the region capability
chain) travels beside it as bytes; `commands.py` says which command carries which.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Annotated, Final

from protocol._fields import U16, U32, U64, Scalar, record
from protocol._fields import Record as Record
from protocol.limits import HEADER_SIZE
from protocol.vfio import DeviceFlags, DmaMapFlags, DmaUnmapFlags, IrqInfoFlags, IrqSetFlags, RegionFlags

TYPE_MASK: Final = 0xF
"""The bits of a header's flags that tell a command (0) from a reply (1)."""


class HeaderFlags(IntFlag):
    """Flags of the header (spec, "Header"); bits 0 to 3 are a number, of which 0 and 1 are defined."""

    REPLY = 1 << 0
    NO_REPLY = 1 << 4
    ERROR = 1 << 5


@record(size=HEADER_SIZE)
class Header(Record):
    """Begins every message. `message_size` counts the header too; `error` is an errno in an error reply,
    otherwise 0.
    """

    message_id: U16
    command: U16
    message_size: U32
    flags: Annotated[HeaderFlags, Scalar("I")]
    error: U32


@record(size=4)
class Version(Record):
    """VFIO_USER_VERSION, both ways; JSON capabilities and a NUL may follow."""

    major: U16
    minor: U16


@record(size=32)
class DmaMap(Record):
    """VFIO_USER_DMA_MAP: a window of `length` bytes at the IOVA `address`, `offset` bytes into the
    descriptor sent along.
    """

    argsz: U32
    flags: Annotated[DmaMapFlags, Scalar("I")]
    offset: U64
    address: U64
    length: U64


@record(size=24)
class DmaUnmap(Record):
    """VFIO_USER_DMA_UNMAP, and its reply, which repeats it."""

    argsz: U32
    flags: Annotated[DmaUnmapFlags, Scalar("I")]
    address: U64
    length: U64


@record(size=16)
class DeviceInfo(Record):
    """VFIO_USER_DEVICE_GET_INFO, both ways; a request sets `argsz` alone."""

    argsz: U32
    flags: Annotated[DeviceFlags, Scalar("I")] = DeviceFlags(0)
    num_regions: U32 = 0
    num_irqs: U32 = 0


@record(size=32)
class RegionInfo(Record):
    """VFIO_USER_DEVICE_GET_REGION_INFO, both ways; a request sets `argsz` and `index` alone.

    `length` is the region's size; `offset` is what to give to mmap with the descriptor that comes along;
    `cap_offset` counts from the start of this record to the first capability.
    """

    argsz: U32
    flags: Annotated[RegionFlags, Scalar("I")] = RegionFlags(0)
    index: U32 = 0
    cap_offset: U32 = 0
    length: U64 = 0
    offset: U64 = 0


@record(size=8)
class CapabilityHeader(Record):
    """Begins each region capability (struct vfio_info_cap_header); `next` counts from the start of
    RegionInfo, 0 ends the chain.
    """

    id: U16
    version: U16
    next: U32


@record(size=8)
class SparseMmapHeader(Record):
    """Follows the header of a sparse mmap capability; `nr_areas` areas come next."""

    nr_areas: U32
    reserved: U32 = 0


@record(size=16)
class SparseMmapArea(Record):
    """A part of a region that may be mapped: bytes from the region's start, bytes long."""

    offset: U64
    length: U64


@record(size=16)
class IrqInfo(Record):
    """VFIO_USER_DEVICE_GET_IRQ_INFO, both ways; a request sets `argsz` and `index` alone."""

    argsz: U32
    flags: Annotated[IrqInfoFlags, Scalar("I")] = IrqInfoFlags(0)
    index: U32 = 0
    count: U32 = 0


@record(size=20)
class SetIrqs(Record):
    """VFIO_USER_DEVICE_SET_IRQS; a byte per interrupt follows with DATA_BOOL, descriptors come along with
    DATA_EVENTFD.
    """

    argsz: U32
    flags: Annotated[IrqSetFlags, Scalar("I")]
    index: U32
    start: U32
    count: U32


@record(size=16)
class RegionAccess(Record):
    """VFIO_USER_REGION_READ and REGION_WRITE, both ways; `count` bytes follow in a write request and a read
    reply.
    """

    offset: U64
    region: U32
    count: U32
