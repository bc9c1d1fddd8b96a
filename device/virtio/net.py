"""What a virtio network device shows its driver (virtio 1.3, 5.1): configuration, queues, commands."""

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

RX_QUEUE = 0
TX_QUEUE = 1
CONTROL_QUEUE = 2  # with one queue pair

HEADER_SIZE = 12  # struct virtio_net_hdr_v1, num_buffers included

MIN_MTU = 68  # RFC 791: every internet module must be able to forward 68 octets
MAX_MTU = 65535


class LinkStatus(IntFlag):
    """The `status` field of the configuration space."""

    LINK_UP = 1
    ANNOUNCE = 2  # the driver is to tell the network where it is (5.1.6.5.4)


class ControlClass(IntEnum):
    """First byte of a control command (5.1.6.5)."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5


class RxCommand(IntEnum):
    """Commands of ControlClass.RX; each carries one byte, 0 or 1."""

    PROMISC = 0
    ALLMULTI = 1
    ALLUNI = 2
    NOMULTI = 3
    NOUNI = 4
    NOBCAST = 5


class MacCommand(IntEnum):
    """Commands of ControlClass.MAC."""

    TABLE_SET = 0
    ADDR_SET = 1


class AnnounceCommand(IntEnum):
    """Commands of ControlClass.ANNOUNCE, which carry nothing."""

    ACK = 0


class Ack(IntEnum):
    """Last byte of a control command, written by the device."""

    OK = 0
    ERR = 1


# Padded to the end of the whole struct. Drivers of the IFC VF read it in one piece (vdpa_dev_config_fill in
# drivers/vdpa/vdpa.c), and theirs warns about a device that has less of it.
_CONFIG = struct.Struct("<6sHHH16x")


@dataclass(slots=True)
class NetConfig:
    """struct virtio_net_config (5.1.4); behind `mtu` are zeros, which no feature here gives a meaning to."""

    mac: bytes
    status: LinkStatus = LinkStatus.LINK_UP
    max_virtqueue_pairs: int = 1
    mtu: int = 1500

    def encode(self) -> bytes:
        """The bytes that the driver reads."""
        return _CONFIG.pack(self.mac, self.status, self.max_virtqueue_pairs, self.mtu)


CONFIG_SIZE = _CONFIG.size
