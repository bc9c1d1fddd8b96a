"""Virtio over PCI, modern transport (virtio 1.3, section 4.1).

Common configuration, doorbells, ISR and device configuration. The registers are declared once below; what a
register does stands in a `_get_` or `_set_` method of its name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Protocol

from device.declared import DeclaredRegisters, Register
from device.errors import DeviceError
from device.interrupts._lines import NO_VECTOR, Lines
from device.virtio._split import VirtQueue
from device.virtio.features import Feature, missing_requirement

log = logging.getLogger("trionic.virtio")


class Status(IntFlag):
    """Device status bits (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Isr(IntFlag):
    """ISR status bits (4.1.4.5)."""

    QUEUE = 1
    CONFIG = 2


COMMON_CONFIG: tuple[Register, ...] = (
    Register("device_feature_select", 0x00, 4),
    Register("device_feature", 0x04, 4, writable=False),
    Register("driver_feature_select", 0x08, 4),
    Register("driver_feature", 0x0C, 4),
    Register("config_msix_vector", 0x10, 2),
    Register("num_queues", 0x12, 2, writable=False),
    Register("device_status", 0x14, 1),
    Register("config_generation", 0x15, 1, writable=False),
    Register("queue_select", 0x16, 2),
    Register("queue_size", 0x18, 2),
    Register("queue_msix_vector", 0x1A, 2),
    Register("queue_enable", 0x1C, 2),
    Register("queue_notify_off", 0x1E, 2, writable=False),
    Register("queue_desc", 0x20, 8),
    Register("queue_driver", 0x28, 8),
    Register("queue_device", 0x30, 8),
)
COMMON_CONFIG_SIZE = 0x38

NOTIFY_STRIDE = 4096  # one page a queue, so that a doorbell can be mapped alone


class Model(Protocol):
    """The device type behind the transport. All calls come with the card's gate held, except `notified`."""

    def offered_features(self) -> Feature:
        """What the device can do now."""

    def driver_ready(self, features: int) -> None:
        """DRIVER_OK was written; `features`, bits of Feature, were agreed on."""

    def driver_gone(self) -> None:
        """The device was reset."""

    def notified(self, queue: int) -> None:
        """The driver rang the doorbell of `queue`."""

    def read_config(self, offset: int, count: int) -> bytes:
        """Device-specific configuration; bytes beyond its end read as zero."""


@dataclass(slots=True)
class QueueSetup:
    """What the driver wrote for a queue: in use from when it is enabled, and from DRIVER_OK."""

    size: int
    desc: int = 0
    driver: int = 0
    device: int = 0


class VirtioPciTransport:
    """The registers of one virtio PCI device with `queues`, signalling through `lines`.

    `on_reset()` is called after each reset, the driver's own and the function's.
    """

    def __init__(self, model: Model, queues: Sequence[VirtQueue], lines: Lines) -> None:
        self.model = model
        self.queues = tuple(queues)
        self.lines = lines
        self.common = CommonConfig(self)
        self.isr = IsrStatus(lines)
        self.device = DeviceConfig(model)
        self.doorbells = Doorbells(model, len(self.queues))
        self.config_generation = 0
        self.on_reset: Callable[[], None] = lambda: None
        self._power_on()

    def _power_on(self) -> None:
        self.status = self._left_behind = Status(0)
        # Plain bits: a Feature remembers for ever each value that it was made from, and drivers choose these.
        self.driver_features = 0
        self.config_vector = NO_VECTOR
        self.setups = [QueueSetup(queue.max_size) for queue in self.queues]
        for queue in self.queues:
            queue.reset()
        self.common.deselect()

    def reset(self) -> None:
        """Status 0: the driver starts over (2.4)."""
        shown = self.shown_status  # an earlier reset may not be complete either
        self.model.driver_gone()
        self._power_on()
        self._left_behind = shown
        self.lines.read_isr()
        self.on_reset()

    @property
    def shown_status(self) -> Status:
        """The status as the driver reads it: not 0 before its reset is complete (4.1.4.3.1).

        The client may still be carrying out what the card asked of it for the driver that is gone; until it
        has answered, that driver must not put its memory to other use. Nor is its log of written pages
        complete while bits are on their way there.
        """
        dma = self.queues[0].dma
        if not self.status and (dma.unanswered or dma.guest_log_owed):
            return self._left_behind
        return self.status

    def write_status(self, value: int) -> None:
        """The driver moves on; FEATURES_OK stays clear when it accepted what was not offered (3.1.1)."""
        if value == 0:
            self.reset()
            return
        new = Status(value & ~Status.NEEDS_RESET) | (self.status & Status.NEEDS_RESET)
        if new & Status.FEATURES_OK and not self.status & Status.FEATURES_OK and not self._features_agreed():
            new &= ~Status.FEATURES_OK
        if not new & Status.FEATURES_OK:
            new &= ~Status.DRIVER_OK  # nothing was agreed on that a device could start with (3.1.1)
        starts = new & Status.DRIVER_OK and not self.running
        if starts:
            self._take_settings()
            new |= self.status & Status.NEEDS_RESET
        self.status = new
        if starts:
            self.model.driver_ready(self.driver_features)

    def _features_agreed(self) -> bool:
        objection = self.objection(self.driver_features)
        if objection:
            log.warning("driver %s", objection)
        return objection is None

    def objection(self, features: int) -> str | None:
        """What a driver did wrong that accepted `features`, or None."""
        excess = features & ~int(self.model.offered_features())
        missing = missing_requirement(features)
        if excess:
            return f"accepted features that were not offered: {excess:#x}"
        if not features & Feature.VERSION_1:
            return "did not accept VERSION_1; legacy drivers are not served"
        if missing:
            return "accepted {} without {}".format(*(flag.name for flag in missing))
        return None

    def config_differs(self) -> None:
        """What the driver may have read of the device-specific configuration holds no more (4.1.4.3.1)."""
        self.config_generation = (self.config_generation + 1) & 0xFF

    def config_changed(self) -> None:
        """The device-specific configuration changed: tell a running driver (2.5)."""
        self.config_differs()
        if self.status & Status.DRIVER_OK:
            self.lines.signal(Isr.CONFIG, self.config_vector)

    def needs_reset(self) -> None:
        """The device cannot go on until the driver resets it (2.1.2)."""
        if not self.status & Status.NEEDS_RESET:
            self.status |= Status.NEEDS_RESET
            if self.status & Status.DRIVER_OK:
                self.lines.signal(Isr.CONFIG, self.config_vector)

    def resignal(self) -> None:
        """Interrupt a running driver for everything: whatever it was told last may not have reached it."""
        if self.status & Status.DRIVER_OK:
            self.lines.signal(Isr.CONFIG, self.config_vector)
            for queue in self.queues:
                if queue.enabled:
                    self.lines.signal(Isr.QUEUE, queue.vector)

    @property
    def running(self) -> bool:
        """Whether the driver said DRIVER_OK; until then the card leaves the rings of enabled queues alone."""
        return bool(self.status & Status.DRIVER_OK)

    def _take_settings(self) -> None:
        """Let queues that are enabled already start on what was written last, before or after that.

        Drivers are to enable a queue after everything else (4.1.4.3.2). QEMU's vhost-vdpa enables it first,
        and Linux's ifcvf and vp_vdpa hand that on as it comes.
        """
        for index, queue in enumerate(self.queues):
            if queue.enabled:
                queue.disable()
                self.enable_queue(index)

    def enable_queue(self, index: int) -> None:
        """Start a queue on what the driver wrote; a refusal leaves it disabled and asks for a reset."""
        setup = self.setups[index]
        try:
            self.queues[index].enable(
                setup.size,
                setup.desc,
                setup.driver,
                setup.device,
                event_index=bool(self.driver_features & Feature.RING_EVENT_IDX),
                indirect=bool(self.driver_features & Feature.RING_INDIRECT_DESC),
            )
        except DeviceError as error:
            log.warning("%s", error)
            self.needs_reset()
            return
        if self.status & Status.DRIVER_OK:
            self.model.notified(index)  # chains may be there already

    def stop_queue(self, index: int) -> None:
        """Let a queue come to rest: queue_enable reads 1 until no chain of it is in flight, and then its
        indices are those of the ring. Virtio has no such thing (4.1.4.3.2), the IFC VF's drivers do it.
        """
        queue = self.queues[index]
        if not self.status & Status.DRIVER_OK:
            queue.disable()  # a device leaves rings alone until then
            return
        queue.stop()
        queue.finish_stop()
        if queue.enabled:
            self.model.notified(index)

    def continue_queue(self, index: int) -> None:
        """Call off `stop_queue`: chains are in flight still, and the queue goes on with the rings it has."""
        self.queues[index].go_on()
        self.model.notified(index)


class CommonConfig(DeclaredRegisters):
    """struct virtio_pci_common_cfg (4.1.4.3)."""

    def __init__(self, transport: VirtioPciTransport) -> None:
        self._t = transport
        self._queue_select = 0
        self.deselect()
        super().__init__(COMMON_CONFIG)

    def deselect(self) -> None:
        """Every selector back to zero."""
        self.selectors = (0, 0, 0)

    @property
    def selectors(self) -> tuple[int, int, int]:
        """device_feature_select, driver_feature_select and queue_select."""
        return self._device_feature_select, self._driver_feature_select, self._queue_select

    @selectors.setter
    def selectors(self, selected: tuple[int, int, int]) -> None:
        self._device_feature_select, self._driver_feature_select, self._queue_select = selected

    @property
    def _queue(self) -> VirtQueue | None:
        if self._queue_select >= len(self._t.queues):
            return None
        queue = self._t.queues[self._queue_select]
        queue.finish_stop()  # not every driver waits until it reads that
        return queue

    def _vector(self, value: int) -> int:
        """A vector the function does not have reads back as NO_VECTOR (4.1.5.1.2)."""
        return value if value < self._t.lines.vectors else NO_VECTOR

    # --- features: only words 0 and 1 are in use; any other word reads zero and takes nothing

    def _get_device_feature_select(self) -> int:
        return self._device_feature_select

    def _set_device_feature_select(self, value: int) -> None:
        self._device_feature_select = value

    def _get_device_feature(self) -> int:
        if self._device_feature_select > 1:
            return 0
        return self._t.model.offered_features() >> 32 * self._device_feature_select & 0xFFFFFFFF

    def _get_driver_feature_select(self) -> int:
        return self._driver_feature_select

    def _set_driver_feature_select(self, value: int) -> None:
        self._driver_feature_select = value

    def _get_driver_feature(self) -> int:
        if self._driver_feature_select > 1:
            return 0
        return self._t.driver_features >> 32 * self._driver_feature_select & 0xFFFFFFFF

    def _set_driver_feature(self, value: int) -> None:
        if self._driver_feature_select > 1 or self._t.status & Status.FEATURES_OK:
            return
        shift = 32 * self._driver_feature_select
        self._t.driver_features = self._t.driver_features & ~(0xFFFFFFFF << shift) | value << shift

    # --- device

    def _get_config_msix_vector(self) -> int:
        return self._t.config_vector

    def _set_config_msix_vector(self, value: int) -> None:
        self._t.config_vector = self._vector(value)

    def _get_num_queues(self) -> int:
        return len(self._t.queues)

    def _get_device_status(self) -> int:
        return self._t.shown_status

    def _set_device_status(self, value: int) -> None:
        self._t.write_status(value)

    def _get_config_generation(self) -> int:
        return self._t.config_generation

    # --- the selected queue: one that does not exist has size 0 and takes nothing

    def _get_queue_select(self) -> int:
        return self._queue_select

    def _set_queue_select(self, value: int) -> None:
        self._queue_select = value

    @property
    def _setup(self) -> QueueSetup | None:
        return self._t.setups[self._queue_select] if self._queue_select < len(self._t.setups) else None

    def _get_queue_size(self) -> int:
        return self._setup.size if self._setup else 0

    def _set_queue_size(self, value: int) -> None:
        setup, queue = self._setup, self._queue
        if setup and queue and not (queue.enabled and self._t.running):
            setup.size = value

    def _get_queue_msix_vector(self) -> int:
        return self._queue.vector if self._queue else NO_VECTOR

    def _set_queue_msix_vector(self, value: int) -> None:
        if self._queue:
            self._queue.vector = self._vector(value)

    def _get_queue_enable(self) -> int:
        return int(self._queue.enabled) if self._queue else 0

    def _set_queue_enable(self, value: int) -> None:
        queue = self._queue
        if not queue:
            return
        if value == 0:
            self._t.stop_queue(self._queue_select)
        elif queue.stopping:
            self._t.continue_queue(self._queue_select)
        elif not queue.enabled:
            self._t.enable_queue(self._queue_select)

    def _get_queue_notify_off(self) -> int:
        return self._queue_select if self._queue else 0

    def _get_queue_desc(self) -> int:
        return self._setup.desc if self._setup else 0

    def _set_queue_desc(self, value: int) -> None:
        if self._setup:
            self._setup.desc = value

    def _get_queue_driver(self) -> int:
        return self._setup.driver if self._setup else 0

    def _set_queue_driver(self, value: int) -> None:
        if self._setup:
            self._setup.driver = value

    def _get_queue_device(self) -> int:
        return self._setup.device if self._setup else 0

    def _set_queue_device(self, value: int) -> None:
        if self._setup:
            self._setup.device = value


class IsrStatus:
    """The ISR byte: reading it clears it and lets INTx go."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def read(self, offset: int, count: int) -> int:
        """Read the byte at offset 0, whatever the width of the access."""
        return self._lines.read_isr() if offset == 0 else 0

    def write(self, offset: int, count: int, value: int) -> None:
        """Drivers have nothing to write here."""


class DeviceConfig:
    """Device-specific configuration (4.1.4.6); read-only, for MAC changes go through the control queue."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def read(self, offset: int, count: int) -> int:
        """Read `count` bytes as a little-endian number."""
        return int.from_bytes(self._model.read_config(offset, count), "little")

    def write(self, offset: int, count: int, value: int) -> None:
        """Refused in silence, as a device without writable fields may."""


class Doorbells:
    """The notification area (4.1.4.4): one page a queue."""

    def __init__(self, model: Model, queues: int) -> None:
        self._model = model
        self._queues = queues

    @property
    def size(self) -> int:
        """Bytes of the area."""
        return self._queues * NOTIFY_STRIDE

    def read(self, offset: int, count: int) -> int:
        """Doorbells read as zero."""
        return 0

    def write(self, offset: int, count: int, value: int) -> None:
        """Ring the doorbell of the queue whose page this is."""
        self._model.notified(offset // NOTIFY_STRIDE)
