"""The card: a PCI function in the shape of the Intel IFC VF with a virtio network device behind it.

BAR 0, 32 KiB, registers                    BAR 2, on-card memory         BAR 4, 4 KiB
    0x0000  virtio common configuration         64-bit, prefetchable,         the live-migration block's
    0x1000  ISR status                          mappable                      place in an IFC VF
    0x2000  device configuration
    0x3000  doorbells, a page a queue
    0x6000  MSI-X table
    0x7000  MSI-X pending bits

Virtio structures lie in BARs 0, 2 and 4 only and all three BARs exist: the kernel's drivers/vdpa/ifcvf asks
for that.
"""

from __future__ import annotations

from collections.abc import Sequence

from device.dma import DmaWindows
from device.function import IoEventFdArea, PciFunction, ResetKind
from device.migration.migration import Migration
from device.migration.sessions import Part
from device.pci import Bar, Identity, MemoryBar
from device.pci.capabilities import (
    Msi,
    Msix,
    PciExpress,
    PowerManagement,
    VirtioCapability,
    VirtioCfgType,
    VirtioNotify,
    VirtioPciCfgAccess,
)
from device.revocation import Revocation
from device.virtio._split import VirtQueue
from device.virtio.moving import TransportState
from device.virtio.net import CONFIG_SIZE
from device.virtio.transport import COMMON_CONFIG_SIZE, NOTIFY_STRIDE, Model, VirtioPciTransport

IFC_VF = Identity(vendor=0x1AF4, device=0x1041, subsystem_vendor=0x8086, subsystem=0x001A)

COMMON = 0x0000
ISR = 0x1000
DEVICE_CONFIG = 0x2000
DOORBELLS = 0x3000
MSIX_TABLE = 0x6000
MSIX_PBA = 0x7000
BAR0_SIZE = 0x8000
BAR4_SIZE = 0x1000

QUEUES = 3  # receive, transmit, control
VECTORS = QUEUES + 1  # one a queue and one for configuration changes

DEFAULT_QUEUE_SIZE = 256  # what QEMU's virtio-net has
DEFAULT_BAR2_SIZE = 16 << 20


class NetworkCard:
    """A PCI function and its virtio transport, for `model` to give it life.

    Without `msix` the card has MSI and INTx only, of which virtio drivers use INTx. `revocation` says what
    takes mappings of its memory away.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str = "nic0",
        bar2_size: int = DEFAULT_BAR2_SIZE,
        queue_size: int = DEFAULT_QUEUE_SIZE,
        msix: bool = True,
        revocation: Revocation = Revocation.COOPERATIVE,
    ) -> None:
        dma = DmaWindows()
        bar0 = Bar(0, BAR0_SIZE)
        self.memory = MemoryBar(2, bar2_size, revocation=revocation)
        self.function = PciFunction(
            name,
            IFC_VF,
            bars=[bar0, self.memory, Bar(4, BAR4_SIZE)],
            capabilities=[
                PowerManagement(),
                Msi(),
                *([Msix(VECTORS, table_bar=0, table_offset=MSIX_TABLE, pba_offset=MSIX_PBA)] if msix else []),
                PciExpress(),
                VirtioCapability(VirtioCfgType.COMMON, 0, COMMON, COMMON_CONFIG_SIZE),
                VirtioCapability(VirtioCfgType.ISR, 0, ISR, 1),
                VirtioCapability(VirtioCfgType.DEVICE, 0, DEVICE_CONFIG, CONFIG_SIZE),
                VirtioNotify(0, DOORBELLS, QUEUES * NOTIFY_STRIDE, NOTIFY_STRIDE),
                VirtioPciCfgAccess(),
            ],
            dma=dma,
        )
        self.queues = tuple(VirtQueue(dma, index, queue_size) for index in range(QUEUES))
        self.transport = VirtioPciTransport(model, self.queues, self.function.interrupts.lines)
        bar0.claim(COMMON, COMMON_CONFIG_SIZE, self.transport.common, name="common configuration")
        bar0.claim(ISR, 4, self.transport.isr, name="ISR status")
        bar0.claim(DEVICE_CONFIG, NOTIFY_STRIDE, self.transport.device, name="device configuration")
        bar0.claim(
            DOORBELLS, self.transport.doorbells.size, self.transport.doorbells, gated=False, name="doorbells"
        )
        self.function.on_reset = self.reset

    def connect_doorbells(self, fds: Sequence[int]) -> None:
        """Let eventfds, one a queue, stand for its doorbell; whoever owns them does what a write would."""
        self.function.doorbells = {
            0: tuple(IoEventFdArea(DOORBELLS + NOTIFY_STRIDE * n, 2, fd) for n, fd in enumerate(fds))
        }

    def make_movable(self, parts: dict[bytes, Part], traits: dict[str, str]) -> Migration:
        """Give the function its migration: the card's own parts, and after them those of its model."""
        queues = ", ".join(str(queue.max_size) for queue in self.queues)
        self.function.migration = Migration(
            self.function,
            {b"VIRT": TransportState(self.transport), **parts},
            {"queues": queues, **traits},
        )
        return self.function.migration

    def reset(self, kind: ResetKind) -> None:
        """The function is being reset."""
        self.transport.reset()
