"""A driver for virtio network cards over the modern PCI transport."""

from client.virtio._attachment import Slot as Slot
from client.virtio._attachment import Wiring as Wiring
from client.virtio.control import ControlError as ControlError
from client.virtio.control import RxMode as RxMode
from client.virtio.counters import Counters as Counters
from client.virtio.features import OFFLOADS as OFFLOADS
from client.virtio.features import PLAIN as PLAIN
from client.virtio.features import Feature as Feature
from client.virtio.header import Gso as Gso
from client.virtio.header import HeaderFlags as HeaderFlags
from client.virtio.header import NetHeader as NetHeader
from client.virtio.net import NetDriver as NetDriver
from client.virtio.net import open_net as open_net
from client.virtio.transport import Status as Status
from client.virtio.transport import VirtioPci as VirtioPci
