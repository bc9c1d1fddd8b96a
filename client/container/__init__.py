"""DMA for any number of devices, as behind one IOMMU: what is mapped, who reaches it, what is pinned."""

from client.container.backing import Backing as Backing
from client.container.backing import BarRange as BarRange
from client.container.backing import PageMemory as PageMemory
from client.container.backing import PageRef as PageRef
from client.container.container import Container as Container
from client.container.container import open_container as open_container
from client.container.entry import Entry as Entry
from client.container.errors import ContainerError as ContainerError
from client.container.modes import Mode as Mode
from client.container.pinning import PinUser as PinUser
