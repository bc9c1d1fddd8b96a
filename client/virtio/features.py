"""Feature bits of virtio and of its network device (virtio 1.3, sections 5.1.3 and 6), those that this
driver knows.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final


class Feature(IntFlag):
    """A bit each; what the device offers and the driver takes."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    CTRL_GUEST_OFFLOADS = 1 << 2
    MTU = 1 << 3
    MAC = 1 << 5
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    GUEST_ECN = 1 << 9
    GUEST_UFO = 1 << 10
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    HOST_ECN = 1 << 13
    HOST_UFO = 1 << 14
    MRG_RXBUF = 1 << 15
    STATUS = 1 << 16
    CTRL_VQ = 1 << 17
    CTRL_RX = 1 << 18
    CTRL_VLAN = 1 << 19
    CTRL_RX_EXTRA = 1 << 20
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
    CTRL_MAC_ADDR = 1 << 23
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40
    SPEED_DUPLEX = 1 << 63


REQUIRED: Final = Feature.VERSION_1
"""Without it a device is legacy, which this driver does not speak."""

PLAIN: Final = (
    Feature.VERSION_1
    | Feature.ACCESS_PLATFORM
    | Feature.EVENT_IDX
    | Feature.MAC
    | Feature.MTU
    | Feature.STATUS
    | Feature.MRG_RXBUF
    | Feature.CTRL_VQ
    | Feature.CTRL_RX
    | Feature.CTRL_RX_EXTRA
    | Feature.CTRL_MAC_ADDR
    | Feature.GUEST_ANNOUNCE
)
"""What NetDriver takes if offered: whole frames with their checksums, no offloads."""

OFFLOADS: Final = (
    Feature.CSUM
    | Feature.GUEST_CSUM
    | Feature.HOST_TSO4
    | Feature.HOST_TSO6
    | Feature.HOST_ECN
    | Feature.GUEST_TSO4
    | Feature.GUEST_TSO6
    | Feature.GUEST_ECN
)
"""To be added for frames that leave checksums and segmentation to the device; see `header.NetHeader`."""

NEEDS: Final = {
    Feature.CTRL_RX: Feature.CTRL_VQ,
    Feature.CTRL_RX_EXTRA: Feature.CTRL_VQ,
    Feature.CTRL_VLAN: Feature.CTRL_VQ,
    Feature.CTRL_MAC_ADDR: Feature.CTRL_VQ,
    Feature.GUEST_ANNOUNCE: Feature.CTRL_VQ,
    Feature.CTRL_GUEST_OFFLOADS: Feature.CTRL_VQ,
    Feature.MQ: Feature.CTRL_VQ,
    Feature.GUEST_TSO4: Feature.GUEST_CSUM,
    Feature.GUEST_TSO6: Feature.GUEST_CSUM,
    Feature.GUEST_UFO: Feature.GUEST_CSUM,
    Feature.GUEST_ECN: Feature.GUEST_TSO4 | Feature.GUEST_TSO6,
    Feature.HOST_TSO4: Feature.CSUM,
    Feature.HOST_TSO6: Feature.CSUM,
    Feature.HOST_UFO: Feature.CSUM,
    Feature.HOST_ECN: Feature.HOST_TSO4 | Feature.HOST_TSO6,
}
"""A feature is taken only with one of those it needs (virtio 1.3, 5.1.3.1)."""


def usable(features: Feature) -> Feature:
    """The features without those whose own needs are not among them."""
    while True:
        kept = features
        for feature, needs in NEEDS.items():
            if feature in kept and not kept & needs:
                kept &= ~feature
        if kept == features:
            return kept
        features = kept
