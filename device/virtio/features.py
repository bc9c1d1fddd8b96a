"""Feature bits of virtio 1.3: section 6 (transport, ring) and 5.1.3 (network device)."""

from enum import IntFlag


class Feature(IntFlag):
    """Feature bits by the names of the specification, as masks."""

    NET_CSUM = 1 << 0
    NET_GUEST_CSUM = 1 << 1
    NET_CTRL_GUEST_OFFLOADS = 1 << 2
    NET_MTU = 1 << 3
    NET_MAC = 1 << 5
    NET_GUEST_TSO4 = 1 << 7
    NET_GUEST_TSO6 = 1 << 8
    NET_GUEST_ECN = 1 << 9
    NET_GUEST_UFO = 1 << 10
    NET_HOST_TSO4 = 1 << 11
    NET_HOST_TSO6 = 1 << 12
    NET_HOST_ECN = 1 << 13
    NET_HOST_UFO = 1 << 14
    NET_MRG_RXBUF = 1 << 15
    NET_STATUS = 1 << 16
    NET_CTRL_VQ = 1 << 17
    NET_CTRL_RX = 1 << 18
    NET_CTRL_VLAN = 1 << 19
    NET_CTRL_RX_EXTRA = 1 << 20
    NET_GUEST_ANNOUNCE = 1 << 21
    NET_MQ = 1 << 22
    NET_CTRL_MAC_ADDR = 1 << 23
    RING_INDIRECT_DESC = 1 << 28
    RING_EVENT_IDX = 1 << 29
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    SR_IOV = 1 << 37
    NOTIFICATION_DATA = 1 << 38
    NOTIF_CONFIG_DATA = 1 << 39
    RING_RESET = 1 << 40


# A feature on the left may be negotiated only together with one of those on the right (virtio 1.3, 5.1.3.1).
REQUIREMENTS: tuple[tuple[Feature, Feature], ...] = (
    (Feature.NET_GUEST_TSO4, Feature.NET_GUEST_CSUM),
    (Feature.NET_GUEST_TSO6, Feature.NET_GUEST_CSUM),
    (Feature.NET_GUEST_ECN, Feature.NET_GUEST_TSO4 | Feature.NET_GUEST_TSO6),
    (Feature.NET_GUEST_UFO, Feature.NET_GUEST_CSUM),
    (Feature.NET_HOST_TSO4, Feature.NET_CSUM),
    (Feature.NET_HOST_TSO6, Feature.NET_CSUM),
    (Feature.NET_HOST_ECN, Feature.NET_HOST_TSO4 | Feature.NET_HOST_TSO6),
    (Feature.NET_HOST_UFO, Feature.NET_CSUM),
    (Feature.NET_CTRL_RX, Feature.NET_CTRL_VQ),
    (Feature.NET_CTRL_VLAN, Feature.NET_CTRL_VQ),
    (Feature.NET_CTRL_RX_EXTRA, Feature.NET_CTRL_VQ),
    (Feature.NET_GUEST_ANNOUNCE, Feature.NET_CTRL_VQ),
    (Feature.NET_MQ, Feature.NET_CTRL_VQ),
    (Feature.NET_CTRL_MAC_ADDR, Feature.NET_CTRL_VQ),
    (Feature.NET_CTRL_GUEST_OFFLOADS, Feature.NET_CTRL_VQ),
)


def missing_requirement(features: int) -> tuple[Feature, Feature] | None:
    """The first (feature, what it requires) that `features` does not satisfy, or None."""
    for feature, requires in REQUIREMENTS:
        if features & feature and not features & requires:
            return feature, requires
    return None
