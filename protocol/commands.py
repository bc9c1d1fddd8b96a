"""All commands of vfio-user as one table: who sends each, what it carries, and what answers it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Final

from protocol._fields import Record
from protocol.messages import (
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
    Version,
    WriteMulti,
)
from protocol.vfio import Feature, FeatureFlags


class Role(Enum):
    """Which end of the socket this is: the client drives a device, the server is one."""

    CLIENT = "client"
    SERVER = "server"


class Command(IntEnum):
    """Command numbers (spec, "Commands"); 14 was the dirty page command of earlier versions and is gone."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Tail(Enum):
    """What may follow a record."""

    NOTHING = "nothing"
    """A longer message is malformed."""
    IGNORED = "ignored"
    """The record is a struct that grows with its `argsz`: a newer peer's extra fields are skipped, as the
    kernel's ioctls do.
    """
    DATA = "data"
    """Bytes whose length the command's own rules check."""


@dataclass(frozen=True, slots=True)
class Part:
    """One direction of a command: its record (None: an empty message), what may follow, and whether
    descriptors may come along (see `may_carry_fds`).
    """

    record: type[Record] | None = None
    tail: Tail = Tail.NOTHING
    fds: bool = False
    size: int = field(init=False)
    """Bytes of the record."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", self.record.size if self.record else 0)


EMPTY: Final = Part()


@dataclass(frozen=True, slots=True)
class Shape:
    """A command's row. `sender` sends the request."""

    command: Command
    sender: Role
    request: Part
    reply: Part = EMPTY


def _table(*rows: Shape) -> dict[int, Shape]:
    return {int(row.command): row for row in rows}


_C, _S = Role.CLIENT, Role.SERVER

SHAPES: Final[dict[int, Shape]] = _table(
    Shape(Command.VERSION, _C, Part(Version, Tail.DATA), Part(Version, Tail.DATA, fds=True)),
    Shape(Command.DMA_MAP, _C, Part(DmaMap, Tail.IGNORED, fds=True)),
    Shape(Command.DMA_UNMAP, _C, Part(DmaUnmap, Tail.DATA), Part(DmaUnmap, Tail.DATA)),
    Shape(Command.DEVICE_GET_INFO, _C, Part(DeviceInfo, Tail.IGNORED), Part(DeviceInfo, Tail.IGNORED)),
    Shape(
        Command.DEVICE_GET_REGION_INFO,
        _C,
        Part(RegionInfo, Tail.IGNORED),
        Part(RegionInfo, Tail.DATA, fds=True),
    ),
    Shape(
        Command.DEVICE_GET_REGION_IO_FDS,
        _C,
        Part(RegionIoFds, Tail.IGNORED),
        Part(RegionIoFds, Tail.DATA, fds=True),
    ),
    Shape(Command.DEVICE_GET_IRQ_INFO, _C, Part(IrqInfo, Tail.IGNORED), Part(IrqInfo, Tail.IGNORED)),
    Shape(Command.DEVICE_SET_IRQS, _C, Part(SetIrqs, Tail.DATA, fds=True)),
    Shape(Command.REGION_READ, _C, Part(RegionAccess), Part(RegionAccess, Tail.DATA)),
    Shape(Command.REGION_WRITE, _C, Part(RegionAccess, Tail.DATA), Part(RegionAccess)),
    Shape(Command.DMA_READ, _S, Part(DmaAccess), Part(DmaAccess, Tail.DATA)),
    Shape(Command.DMA_WRITE, _S, Part(DmaAccess, Tail.DATA), Part(DmaAccess)),
    Shape(Command.DEVICE_RESET, _C, EMPTY),
    Shape(Command.REGION_WRITE_MULTI, _C, Part(WriteMulti, Tail.DATA), Part(WriteMulti)),
    Shape(
        Command.DEVICE_FEATURE,
        _C,
        Part(DeviceFeature, Tail.DATA),
        Part(DeviceFeature, Tail.DATA, fds=True),
    ),
    Shape(Command.MIG_DATA_READ, _C, Part(MigData, Tail.IGNORED), Part(MigData, Tail.DATA)),
    Shape(Command.MIG_DATA_WRITE, _C, Part(MigData, Tail.DATA)),
)


def may_carry_fds(part: Part, body: Record | None) -> bool:
    """Whether descriptors may come along with `body`: of the features, an exported BAR alone is one."""
    if isinstance(body, DeviceFeature):
        return part.fds and int(body.flags) == FeatureFlags.GET | Feature.DMA_BUF
    return part.fds


def command_name(number: int) -> str:
    """The command's name, or its number in words if there is no such command."""
    shape = SHAPES.get(number)
    return shape.command.name if shape else f"command {number}"
