"""The modern PCI transport of virtio (virtio 1.3, 4.1), found through a function's vendor capabilities.

Registers of the common structure are a table; each access is of the register's own width and goes by message,
which has its effects at the device even where the server lets registers be mapped. Doorbells are rung as
`Doorbells` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Literal, Self

import trio

from client._eventfd import is_eventfd, signal
from client.bars import Bar
from client.errors import DeviceError
from client.io_fds import IoFds
from client.mapping import Width
from client.pci import ConfigSpace, VirtioCapability
from client.session import Session
from client.virtio.features import Feature

NO_VECTOR: Final = 0xFFFF

RESET_POLL: Final = 0.001
"""Seconds between looks at a device that takes its time to reset."""

CONFIG_TRIES: Final = 100
"""Reads of the device configuration until it did not change meanwhile."""


class Structure(IntEnum):
    """cfg_type of a vendor capability."""

    COMMON = 1
    NOTIFY = 2
    ISR = 3
    DEVICE = 4
    PCI_ACCESS = 5


class Status(IntFlag):
    """device_status (virtio 1.3, 2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Isr(IntFlag):
    """What a read of the ISR register says, and thereby clears."""

    QUEUE = 1
    CONFIG = 2


@dataclass(frozen=True, slots=True)
class Register:
    """A register of the common structure."""

    offset: int
    width: Width


class Common:
    """The common structure (virtio 1.3, 4.1.4.3), up to what every 1.x device has; 64-bit addresses are two
    halves each.
    """

    DEVICE_FEATURE_SELECT: Final = Register(0x00, 4)
    DEVICE_FEATURE: Final = Register(0x04, 4)
    DRIVER_FEATURE_SELECT: Final = Register(0x08, 4)
    DRIVER_FEATURE: Final = Register(0x0C, 4)
    CONFIG_VECTOR: Final = Register(0x10, 2)
    NUM_QUEUES: Final = Register(0x12, 2)
    DEVICE_STATUS: Final = Register(0x14, 1)
    CONFIG_GENERATION: Final = Register(0x15, 1)
    QUEUE_SELECT: Final = Register(0x16, 2)
    QUEUE_SIZE: Final = Register(0x18, 2)
    QUEUE_VECTOR: Final = Register(0x1A, 2)
    QUEUE_ENABLE: Final = Register(0x1C, 2)
    QUEUE_NOTIFY_OFF: Final = Register(0x1E, 2)
    QUEUE_DESCRIPTORS: Final = Register(0x20, 4)
    QUEUE_DRIVER: Final = Register(0x28, 4)
    QUEUE_DEVICE: Final = Register(0x30, 4)
    SIZE: Final = 0x38


Doorbells = Literal["mapped", "message", "eventfd"]
"""How queues are notified: by a store where the server lets the doorbells be mapped and else by a posted
write; by a posted write always; or by an eventfd that the server gives for it.
"""


@dataclass(frozen=True, slots=True)
class Doorbell:
    """Where a queue's notifications go. `ring` never waits. `eventfd` is the transport's, -1 for none."""

    bar: Bar
    offset: int
    queue: int
    eventfd: int = -1

    def ring(self) -> None:
        """Tell the device to look at the queue."""
        if self.eventfd >= 0:
            signal(self.eventfd)
        else:
            self.bar.post(self.offset, 2, self.queue)


class VirtioPci:
    """A virtio device behind a session. A context manager; it unmaps the BARs at the end.

    Raises DeviceError if a structure is missing or does not lie inside its BAR. Doorbells are rung by
    eventfd after `use_eventfds` only.
    """

    def __init__(self, session: Session, config: ConfigSpace, *, map_doorbells: bool = True) -> None:
        self.session = session
        self._io_fds: IoFds | None = None
        self.structures = _find_structures(config)
        self._common = self._structure(Structure.COMMON, Common.SIZE)
        self._isr = self._structure(Structure.ISR, 1)
        self._device = self._structure(Structure.DEVICE, 0) if Structure.DEVICE in self.structures else None
        self._notify = self._structure(Structure.NOTIFY, 2, mapped=map_doorbells)

    def _structure(self, kind: Structure, least: int, *, mapped: bool = False) -> tuple[Bar, int, int]:
        found = self.structures.get(kind)
        if found is None:
            raise DeviceError(f"the device has no virtio structure {kind.name}")
        regions = self.session.regions
        size = regions[found.bar].size if found.bar < min(6, len(regions)) else 0
        if found.length < least or found.length > size or found.offset > size - found.length:
            place = f"{found.offset:#x}+{found.length:#x} of BAR {found.bar}, {size:#x} long"
            raise DeviceError(f"virtio structure {kind.name} is at {place}")
        return Bar(self.session, found.bar, map=mapped), found.offset, found.length

    async def get(self, register: Register) -> int:
        """Read a register of the common structure."""
        bar, base, _ = self._common
        return await bar.read(base + register.offset, register.width)

    async def set(self, register: Register, value: int) -> None:
        """Write a register of the common structure."""
        bar, base, _ = self._common
        await bar.write(base + register.offset, register.width, value)

    async def _set_address(self, register: Register, address: int) -> None:
        await self.set(register, address & 0xFFFF_FFFF)
        await self.set(Register(register.offset + 4, 4), address >> 32)

    async def reset(self) -> None:
        """Write 0 to the status and wait until the device says that it is reset."""
        await self.set(Common.DEVICE_STATUS, 0)
        while await self.get(Common.DEVICE_STATUS):  # noqa: ASYNC110  (a register; nobody sets an event)
            await trio.sleep(RESET_POLL)

    async def status(self) -> Status:
        """The device's status."""
        return Status(await self.get(Common.DEVICE_STATUS))

    async def add_status(self, bits: Status) -> Status:
        """Set further bits of the status; what it is afterwards."""
        await self.set(Common.DEVICE_STATUS, int(await self.status() | bits))
        return await self.status()

    async def offered_features(self) -> Feature:
        """The 64 features that the device offers."""
        words = []
        for word in range(2):
            await self.set(Common.DEVICE_FEATURE_SELECT, word)
            words.append(await self.get(Common.DEVICE_FEATURE))
        return Feature(words[0] | words[1] << 32)

    async def accept_features(self, features: Feature) -> None:
        """Tell the device what the driver takes; raises DeviceError if the device will not work so."""
        for word in range(2):
            await self.set(Common.DRIVER_FEATURE_SELECT, word)
            await self.set(Common.DRIVER_FEATURE, int(features) >> 32 * word & 0xFFFF_FFFF)
        if Status.FEATURES_OK not in await self.add_status(Status.FEATURES_OK):
            raise DeviceError(f"the device does not accept features {int(features):#x}")

    async def set_config_vector(self, vector: int) -> None:
        """The MSI-X vector of configuration changes; raises DeviceError if the device refuses it."""
        await self.set(Common.CONFIG_VECTOR, vector)
        if await self.get(Common.CONFIG_VECTOR) != vector:
            raise DeviceError(f"the device refuses vector {vector} for its configuration")

    async def queue_size(self, queue: int) -> int:
        """Most descriptors of a queue, 0 if there is no such queue."""
        await self.set(Common.QUEUE_SELECT, queue)
        return await self.get(Common.QUEUE_SIZE)

    async def enable_queue(
        self, queue: int, size: int, descriptors: int, driver: int, device: int, vector: int
    ) -> Doorbell:
        """Start a queue on rings at these I/O addresses; where to notify it. Raises DeviceError if the
        device refuses.
        """
        await self.set(Common.QUEUE_SELECT, queue)
        if await self.get(Common.QUEUE_ENABLE):
            raise DeviceError(f"queue {queue} is enabled before it is set up")
        await self.set(Common.QUEUE_SIZE, size)
        if await self.get(Common.QUEUE_SIZE) != size:
            raise DeviceError(f"the device refuses {size} descriptors for queue {queue}")
        await self._set_address(Common.QUEUE_DESCRIPTORS, descriptors)
        await self._set_address(Common.QUEUE_DRIVER, driver)
        await self._set_address(Common.QUEUE_DEVICE, device)
        await self.set(Common.QUEUE_VECTOR, vector)
        if await self.get(Common.QUEUE_VECTOR) != vector:
            raise DeviceError(f"the device refuses vector {vector} for queue {queue}")
        doorbell = await self.doorbell(queue)
        await self.set(Common.QUEUE_ENABLE, 1)
        return doorbell

    async def doorbell(self, queue: int) -> Doorbell:
        """Where to notify a queue; raises DeviceError if that is outside the structure, or has no eventfd
        after `use_eventfds`.
        """
        await self.set(Common.QUEUE_SELECT, queue)
        notify_off = await self.get(Common.QUEUE_NOTIFY_OFF)
        bar, base, length = self._notify
        offset = notify_off * self.structures[Structure.NOTIFY].multiplier
        if offset + 2 > length:
            raise DeviceError(f"the doorbell of queue {queue} is at {offset:#x} of {length:#x}")
        if self._io_fds is None:
            return Doorbell(bar, base + offset, queue)
        fd = self._io_fds.find(base + offset, 2, queue)
        if fd is None or not is_eventfd(fd):
            raise DeviceError(f"the doorbell of queue {queue} has no eventfd")
        return Doorbell(bar, base + offset, queue, fd)

    async def use_eventfds(self) -> None:
        """Ring by eventfd from now on; raises ServerError if the server gives none."""
        self._io_fds = await self.session.io_fds(self._notify[0].index)

    async def isr(self) -> Isr:
        """Read and clear the interrupt status; the device takes its INTx line down with it."""
        bar, base, _ = self._isr
        return Isr(await bar.read(base, 1) & 3)

    async def device_config(self, length: int) -> bytes:
        """The first bytes of the device's own structure as one consistent whole; fewer if it is shorter."""
        if self._device is None:
            return b""
        bar, base, size = self._device
        length = min(length, size)
        for _ in range(CONFIG_TRIES):
            before = await self.get(Common.CONFIG_GENERATION)
            data = await self.session.region_read(bar.index, base, length)
            if await self.get(Common.CONFIG_GENERATION) == before:
                return data
        raise DeviceError("the device's configuration never stops changing")

    def close(self) -> None:
        """Unmap the doorbells and close their eventfds."""
        self._notify[0].close()
        if self._io_fds is not None:
            self._io_fds.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _find_structures(config: ConfigSpace) -> dict[int, VirtioCapability]:
    """The first capability of each kind, as drivers take it (virtio 1.3, 4.1.4.1)."""
    found: dict[int, VirtioCapability] = {}
    for capability in config.virtio:
        found.setdefault(capability.kind, capability)
    return found


def plan_vectors(available: int, queues: int) -> tuple[int, list[int]]:
    """(vector of the configuration, vectors of the queues) out of so many: each its own, else queues share
    one, else all do.
    """
    if available > queues:
        return 0, list(range(1, queues + 1))
    if available >= 2:
        return 0, [1] * queues
    return 0, [0] * queues
