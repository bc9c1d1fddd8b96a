"""The queues of a network driver: their memory, taken once, and their rings, made anew at each reset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from client.dma import Arena, DmaBuffer
from client.errors import DeviceError
from client.virtio import control
from client.virtio._ring import ReceiveRing, Ring, TransmitRing, ring_layout
from client.virtio.features import Feature
from client.virtio.header import SIZE as HEADER_SIZE
from client.virtio.transport import Doorbell, VirtioPci

RX, TX, CTRL = 0, 1, 2
"""Numbers of the queues without MQ (virtio 1.3, 5.1.2)."""

DEFAULT_MTU: Final = 1500
FRAME_OVERHEAD: Final = 14 + 4
"""Ethernet header and a VLAN tag."""

MAX_GSO_FRAME: Final = 65550
"""A frame with segmentation left to the receiver: 64 KiB of IP and its header (virtio 1.3, 5.1.6.3.1)."""

GUEST_GSO: Final = Feature.GUEST_TSO4 | Feature.GUEST_TSO6 | Feature.GUEST_UFO


@dataclass(frozen=True, slots=True)
class QueuePlan:
    """How deep each queue is and how large its slots are, in bytes."""

    rx_size: int
    tx_size: int
    rx_slot: int
    tx_slot: int
    ctrl_size: int

    @property
    def memory(self) -> int:
        """DMA memory for all of it, alignment included."""
        rings = sum(
            ring_layout(size)[0] + 64 for size in (self.rx_size, self.tx_size, self.ctrl_size) if size
        )
        slots = self.rx_size * self.rx_slot + self.tx_size * self.tx_slot
        return rings + slots + control.SLOTS * control.SLOT_SIZE + 3 * 4096


async def plan_queues(
    transport: VirtioPci, features: Feature, queue_size: int, slot_size: int, mtu: int | None
) -> QueuePlan:
    """What the device has room for; raises DeviceError if a queue is missing."""
    sizes = []
    for queue in range(3 if Feature.CTRL_VQ in features else 2):
        size = await transport.queue_size(queue)
        if size == 0 or size & (size - 1):
            raise DeviceError(f"queue {queue} has {size} descriptors")
        sizes.append(min(size, control.RING_SIZE if queue == CTRL else queue_size))
    return QueuePlan(
        rx_size=sizes[RX],
        tx_size=sizes[TX],
        rx_slot=rx_slot_size(features, slot_size, mtu),
        tx_slot=slot_size,
        ctrl_size=sizes[CTRL] if len(sizes) > CTRL else 0,
    )


def rx_slot_size(features: Feature, slot_size: int, mtu: int | None) -> int:
    """Bytes of a receive slot: `slot_size`, unless a frame must fit into one and is longer (virtio 1.3,
    5.1.6.3.1).
    """
    if Feature.MRG_RXBUF in features:
        return slot_size
    longest = MAX_GSO_FRAME if features & GUEST_GSO else (mtu or DEFAULT_MTU) + FRAME_OVERHEAD
    return max(slot_size, -(-(HEADER_SIZE + longest) // 64) * 64)


class Queues:
    """The memory of all queues. `make` gives the device fresh rings on it."""

    def __init__(self, memory: Arena, plan: QueuePlan) -> None:
        self.plan = plan
        sizes = [size for size in (plan.rx_size, plan.tx_size, plan.ctrl_size) if size]
        self._rings = [memory.allocate(ring_layout(size)[0]) for size in sizes]
        self._rx_slots = memory.allocate(plan.rx_size * plan.rx_slot, align=4096)
        self._tx_slots = memory.allocate(plan.tx_size * plan.tx_slot, align=4096)
        self._ctrl_slots = memory.allocate(control.SLOTS * control.SLOT_SIZE, align=4096)

    def receive_ring(self, features: Feature) -> ReceiveRing:
        """The ring of queue 0, all slots offered but not published."""
        return ReceiveRing(
            self._rings[RX].view,
            self._rings[RX].iova,
            self.plan.rx_size,
            slots=self._rx_slots.view,
            slots_iova=self._rx_slots.iova,
            slot_size=self.plan.rx_slot,
            event_index=Feature.EVENT_IDX in features,
            mergeable=Feature.MRG_RXBUF in features,
        )

    def transmit_ring(self, features: Feature) -> TransmitRing:
        """The ring of queue 1."""
        return TransmitRing(
            self._rings[TX].view,
            self._rings[TX].iova,
            self.plan.tx_size,
            slots=self._tx_slots.view,
            slots_iova=self._tx_slots.iova,
            slot_size=self.plan.tx_slot,
            event_index=Feature.EVENT_IDX in features,
        )

    def control_ring(self, features: Feature) -> Ring:
        """The ring of queue 2."""
        ring = self._rings[CTRL]
        return Ring(ring.view, ring.iova, self.plan.ctrl_size, event_index=Feature.EVENT_IDX in features)

    @property
    def control_memory(self) -> DmaBuffer:
        """Where control commands are built."""
        return self._ctrl_slots


async def start_queue(transport: VirtioPci, queue: int, ring: Ring, vector: int) -> Doorbell:
    """Enable a queue on its ring."""
    return await transport.enable_queue(
        queue, ring.size, ring.descriptor_iova, ring.driver_iova, ring.device_iova, vector
    )
