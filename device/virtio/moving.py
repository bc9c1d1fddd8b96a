"""A virtio PCI transport's registers and queues as bytes, for a card that moves.

The driver's rings stay where they are, in its memory: what goes is where they lie and how far the card is.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from device.errors import DeviceError
from device.interrupts._lines import NO_VECTOR
from device.virtio._split import VirtQueue
from device.virtio.transport import QueueSetup, Status, VirtioPciTransport

# status, generation, configuration vector, driver features, the three selectors
_DEVICE = struct.Struct("<BBHQIIH")

# size, desc, driver, device as written; 1 enabled or 2 stopping, event index, indirect; the first four as
# enabled; indices (last_avail, used_index), vector, why it is broken
_QUEUE = struct.Struct("<HQQQBBBHQQQHHHB")
_STOPPING = 2
_NOT_IN_USE = (0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class _Queue:
    """One queue as it came."""

    setup: QueueSetup
    enabled: bool
    stopping: bool
    event_index: bool
    indirect: bool
    size: int
    addresses: tuple[int, int, int]
    last_avail: int
    used_index: int
    vector: int
    fault: int

    def restore(self, queue: VirtQueue) -> None:
        """DeviceError(EINVAL) for rings that the queue cannot have, ValueError for a fault that is none."""
        queue.reset()
        if self.enabled:
            queue.enable(self.size, *self.addresses, event_index=self.event_index, indirect=self.indirect)
        queue.restore(self.last_avail, self.used_index, self.fault)
        queue.vector = self.vector
        if self.stopping:
            queue.stop()


class TransportState:
    """`transport` as a part of a migration."""

    def __init__(self, transport: VirtioPciTransport) -> None:
        self._transport = transport

    def save(self) -> bytes:
        """Every register, and for each queue its rings and the card's place in them."""
        transport = self._transport
        saved = _DEVICE.pack(
            transport.status & 0xFF,
            transport.config_generation,
            transport.config_vector,
            transport.driver_features,
            *transport.common.selectors,
        )
        for queue, setup in zip(transport.queues, transport.setups, strict=True):
            in_use = (
                queue.event_index,
                queue.indirect,
                queue.size,
                queue.descriptor_address,
                queue.driver_address,
                queue.device_address,
            )
            saved += _QUEUE.pack(
                setup.size,
                setup.desc,
                setup.driver,
                setup.device,
                queue.enabled + queue.stopping,
                *(in_use if queue.enabled else _NOT_IN_USE),
                queue.last_avail,
                queue.used_index,
                queue.vector,
                queue.fault_number,
            )
        return saved

    def stage(self, data: bytes) -> Callable[[], None]:
        """What makes the transport the one that was saved; ValueError for states that no driver leads to."""
        transport = self._transport
        if len(data) != _DEVICE.size + len(transport.queues) * _QUEUE.size:
            raise ValueError(f"{len(data)} bytes for {len(transport.queues)} queues")
        number, generation, vector, features, *selectors = _DEVICE.unpack_from(data)
        status = Status(number)
        if status & Status.FEATURES_OK and (objection := transport.objection(features)):
            raise ValueError(f"a driver that agreed on what this card does not: {objection}")
        if status & Status.DRIVER_OK and not status & Status.FEATURES_OK:
            raise ValueError("a driver that is ready without having agreed on features")
        queues = [self._queue(*fields) for fields in _QUEUE.iter_unpack(data[_DEVICE.size :])]
        for one in (vector, *(queue.vector for queue in queues)):
            if one >= transport.lines.vectors and one != NO_VECTOR:
                raise ValueError(f"vector {one} of {transport.lines.vectors}")
        for index, state in enumerate(queues):
            try:
                state.restore(VirtQueue(transport.queues[index].dma, index, transport.queues[index].max_size))
            except DeviceError as error:
                raise ValueError(str(error)) from error

        def apply() -> None:
            transport.model.driver_gone()
            transport.driver_features = features
            transport.config_generation, transport.config_vector = generation, vector
            transport.common.selectors = tuple(selectors)
            transport.setups = [state.setup for state in queues]
            for queue, state in zip(transport.queues, queues, strict=True):
                state.restore(queue)
            transport.status = status
            if status & Status.DRIVER_OK:
                transport.model.driver_ready(features)

        return apply

    @staticmethod
    def _queue(size: int, desc: int, driver: int, device: int, *fields: int) -> _Queue:
        enabled, event_index, indirect, in_use, table, avail, used, *place = fields
        if enabled > _STOPPING:
            raise ValueError(f"a queue whose being enabled is {enabled}")
        return _Queue(
            QueueSetup(size, desc, driver, device),
            bool(enabled),
            enabled == _STOPPING,
            bool(event_index),
            bool(indirect),
            in_use,
            (table, avail, used),
            *place,
        )
