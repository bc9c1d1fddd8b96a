"""Every message of vfio-user, declared once (QEMU docs/interop/vfio-user.rst; offsets there count from the
end of the header).

A record is the fixed part. What may follow it (JSON, region data, IRQ booleans, the region capability
chain) travels beside it as bytes; `commands.py` says which command carries which.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Annotated, Final

from protocol._fields import U16, U32, U64, Octets8, Scalar, record
from protocol._fields import Record as Record
from protocol.limits import HEADER_SIZE
from protocol.vfio import (
    FEATURE_MASK,
    DeviceFlags,
    DmaMapFlags,
    DmaUnmapFlags,
    FeatureFlags,
    IoEventFdFlags,
    IoFdType,
    IoRegionFdFlags,
    IrqInfoFlags,
    IrqSetFlags,
    MigrationFlags,
    RegionFlags,
)

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
    """VFIO_USER_DMA_UNMAP, and its reply, which repeats it. With GET_DIRTY_BITMAP a `Bitmap` follows both,
    and its bits follow that in the reply.
    """

    argsz: U32
    flags: Annotated[DmaUnmapFlags, Scalar("I")]
    address: U64
    length: U64


@record(size=16)
class Bitmap(Record):
    """Which bitmap DMA_UNMAP is to give (struct vfio_bitmap): a bit for `page_size` bytes, `length` bytes of
    bits.
    """

    page_size: U64
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


@record(size=16)
class RegionIoFds(Record):
    """VFIO_USER_DEVICE_GET_REGION_IO_FDS, both ways; a request sets `argsz` and `index` alone, a reply is
    followed by `count` entries.
    """

    argsz: U32
    flags: U32 = 0
    index: U32 = 0
    count: U32 = 0


@record(size=40)
class IoEventFd(Record):
    """A part of a region whose writes signal an eventfd: bytes from the region's start, bytes long (0: any
    length). `fd_index` counts the message's descriptors.
    """

    offset: U64
    length: U64
    fd_index: U32
    type: U32 = IoFdType.IOEVENTFD
    flags: Annotated[IoEventFdFlags, Scalar("I")] = IoEventFdFlags(0)
    padding: U32 = 0
    datamatch: U64 = 0


@record(size=40)
class IoRegionFd(Record):
    """A part of a region whose accesses are messages on a descriptor; fields as those of IoEventFd."""

    offset: U64
    length: U64
    fd_index: U32
    type: U32 = IoFdType.IOREGIONFD
    flags: Annotated[IoRegionFdFlags, Scalar("I")] = IoRegionFdFlags(0)
    padding: U32 = 0
    user_data: U64 = 0


@record(size=16)
class DmaAccess(Record):
    """VFIO_USER_DMA_READ and DMA_WRITE, both ways; `count` bytes follow in a write request and a read
    reply.
    """

    address: U64
    count: U64


@record(size=8)
class WriteMulti(Record):
    """VFIO_USER_REGION_WRITE_MULTI: `wr_cnt` entries follow; in the reply, how many were done."""

    wr_cnt: U64


@record(size=24)
class WriteMultiEntry(Record):
    """One write of a REGION_WRITE_MULTI: the first `count` of eight bytes."""

    offset: U64
    region: U32
    count: U32
    data: Octets8


@record(size=8)
class DeviceFeature(Record):
    """VFIO_USER_DEVICE_FEATURE, both ways; the feature's own record follows, but not a probe."""

    argsz: U32
    flags: Annotated[FeatureFlags, Scalar("I")]

    @property
    def feature(self) -> int:
        """The feature's number, a `vfio.Feature` if vfio-user has it."""
        return int(self.flags) & FEATURE_MASK


@record(size=8)
class FeatureMigration(Record):
    """Data of Feature.MIGRATION, in the reply to GET."""

    flags: Annotated[MigrationFlags, Scalar("Q")]


@record(size=8)
class FeatureMigState(Record):
    """Data of Feature.MIG_DEVICE_STATE, a `vfio.DeviceState`; `data_fd` is not used in vfio-user."""

    device_state: U32
    data_fd: U32 = 0


@record(size=16)
class DmaLoggingControl(Record):
    """Data of Feature.DMA_LOGGING_START; `num_ranges` ranges follow, none means all memory. In the reply
    `page_size` is the one that was chosen.
    """

    page_size: U64
    num_ranges: U32
    reserved: U32 = 0


@record(size=16)
class DmaLoggingRange(Record):
    """IOVAs whose writes are logged."""

    iova: U64
    length: U64


@record(size=24)
class DmaLoggingReport(Record):
    """Data of Feature.DMA_LOGGING_REPORT: a bit for `page_size` bytes from `iova` on; the bits follow in the
    reply.
    """

    iova: U64
    length: U64
    page_size: U64


@record(size=16)
class DmaBuf(Record):
    """Data of Feature.DMA_BUF, repeated in the reply to GET, which brings one descriptor along: a part of a
    BAR to be shared (linux/vfio.h, struct vfio_device_feature_dma_buf). `nr_ranges` ranges follow;
    `open_flags` are those of the descriptor that the kernel makes.
    """

    region_index: U32
    open_flags: U32
    flags: U32
    nr_ranges: U32


@record(size=16)
class DmaBufRange(Record):
    """Bytes from the region's start, bytes long."""

    offset: U64
    length: U64


@record(size=8)
class MigData(Record):
    """VFIO_USER_MIG_DATA_READ and MIG_DATA_WRITE: `length` bytes follow in a read reply and a write
    request, and `argsz` counts them and the record.
    """

    argsz: U32
    length: U32
