"""The card: a PCI function with a personality of device.profiles, and a virtio network device behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from device.dma import DmaWindows
from device.function import IoEventFdArea, PciFunction, ResetKind
from device.live_migration import LiveMigration
from device.migration.migration import Migration
from device.migration.sessions import Part
from device.pci import Bar, MemoryBar
from device.pci.capabilities import (
    Capability,
    Msi,
    Msix,
    PciExpress,
    PowerManagement,
    VirtioCapability,
    VirtioCfgType,
    VirtioNotify,
    VirtioPciCfgAccess,
)
from device.profiles import (
    COMMON,
    DEVICE_CONFIG,
    DOORBELLS,
    ISR,
    LIVE_MIGRATION_BAR,
    LIVE_MIGRATION_SIZE,
    MEMORY_BAR,
    MSIX_PBA,
    MSIX_TABLE,
    N3000,
    QUEUES,
    REGISTERS_BAR,
    REGISTERS_SIZE,
    Listed,
    Profile,
)
from device.revocation import Revocation
from device.virtio._split import VirtQueue
from device.virtio.moving import TransportState
from device.virtio.net import CONFIG_SIZE
from device.virtio.transport import COMMON_CONFIG_SIZE, NOTIFY_STRIDE, Model, VirtioPciTransport

DEFAULT_BAR2_SIZE = 16 << 20

_CAPABILITIES: Mapping[Listed, Callable[[Profile], Capability]] = {
    Listed.POWER: lambda _profile: PowerManagement(),
    Listed.MSI: lambda _profile: Msi(),
    Listed.MSIX: lambda profile: Msix(
        profile.vectors.count, table_bar=REGISTERS_BAR, table_offset=MSIX_TABLE, pba_offset=MSIX_PBA
    ),
    Listed.EXPRESS: lambda _profile: PciExpress(),
    Listed.COMMON: lambda _profile: VirtioCapability(
        VirtioCfgType.COMMON, REGISTERS_BAR, COMMON, COMMON_CONFIG_SIZE
    ),
    Listed.ISR: lambda _profile: VirtioCapability(VirtioCfgType.ISR, REGISTERS_BAR, ISR, 1),
    Listed.DEVICE: lambda _profile: VirtioCapability(
        VirtioCfgType.DEVICE, REGISTERS_BAR, DEVICE_CONFIG, CONFIG_SIZE
    ),
    Listed.NOTIFY: lambda _profile: VirtioNotify(
        REGISTERS_BAR, DOORBELLS, QUEUES * NOTIFY_STRIDE, NOTIFY_STRIDE
    ),
    Listed.PCI_ACCESS: lambda _profile: VirtioPciCfgAccess(),
}


class NetworkCard:
    """A PCI function as `profile` says and its virtio transport, for `model` to give it life.

    Without `msix` the card has no MSI-X, and virtio drivers use INTx. `revocation` says what takes mappings
    of its memory away. `live_migration` is the IFC VF's block, or None: hidden or not, for who has the card
    in hand.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str = "nic0",
        profile: Profile = N3000,
        bar2_size: int = DEFAULT_BAR2_SIZE,
        msix: bool = True,
        revocation: Revocation = Revocation.COOPERATIVE,
    ) -> None:
        dma = DmaWindows()
        self.profile = profile
        self.memory = MemoryBar(MEMORY_BAR, bar2_size, revocation=revocation)
        bar0 = Bar(REGISTERS_BAR, REGISTERS_SIZE)
        bar4 = Bar(LIVE_MIGRATION_BAR, LIVE_MIGRATION_SIZE)
        bars: tuple[Bar | MemoryBar, ...] = (bar0, self.memory, bar4)
        self.function = PciFunction(
            name,
            profile.identity,
            bars=[bar for bar in bars if bar.index in profile.shown_bars],
            capabilities=[
                _CAPABILITIES[part](profile)
                for part in profile.capabilities
                if msix or part is not Listed.MSIX
            ],
            dma=dma,
        )
        self.queues = tuple(VirtQueue(dma, index, profile.queue_size) for index in range(QUEUES))
        self.transport = VirtioPciTransport(model, self.queues, self.function.interrupts.lines)
        bar0.claim(COMMON, COMMON_CONFIG_SIZE, self.transport.common, name="common configuration")
        bar0.claim(ISR, 4, self.transport.isr, name="ISR status")
        bar0.claim(DEVICE_CONFIG, NOTIFY_STRIDE, self.transport.device, name="device configuration")
        bar0.claim(
            DOORBELLS, self.transport.doorbells.size, self.transport.doorbells, gated=False, name="doorbells"
        )
        self.live_migration: LiveMigration | None = None
        if profile.has_live_migration:
            self.live_migration = LiveMigration(
                self.queues, dma, profile.ring_layout, lambda: self.transport.running
            )
            self.transport.on_reset = self.live_migration.reset
            bar4.claim(0, LIVE_MIGRATION_SIZE, self.live_migration, name="live migration")
        self.function.on_reset = self.reset

    def connect_doorbells(self, fds: Sequence[int]) -> None:
        """Let eventfds, one a queue, stand for its doorbell; whoever owns them does what a write would."""
        self.function.doorbells = {
            REGISTERS_BAR: tuple(
                IoEventFdArea(DOORBELLS + NOTIFY_STRIDE * n, 2, fd) for n, fd in enumerate(fds)
            )
        }

    def make_movable(self, parts: dict[bytes, Part], traits: dict[str, str]) -> Migration:
        """Give the function its migration: the card's own parts, and after them those of its model."""
        queues = ", ".join(str(queue.max_size) for queue in self.queues)
        own: dict[bytes, Part] = {b"VIRT": TransportState(self.transport)}
        if self.live_migration is not None:
            own[b"LIVE"] = self.live_migration
        self.function.migration = Migration(
            self.function,
            {**own, **parts},
            {"profile": self.profile.text, "queues": queues, **traits},
        )
        return self.function.migration

    def reset(self, kind: ResetKind) -> None:
        """The function is being reset."""
        self.transport.reset()
