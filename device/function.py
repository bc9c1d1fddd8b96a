"""One PCI function, as a vfio-user server drives it.

Host and card meet here: regions, interrupts and DMA windows on the host's side; BAR sub-ranges,
`interrupts.signal` and a few hooks on the card's. Methods of the host's side belong to one control thread;
they take the gate that keeps data-path workers out, except for accesses to sub-ranges claimed with
`gated=False`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

from device._gate import Gate
from device.dma import DmaWindows
from device.errors import DeviceError
from device.identity import Identity
from device.interrupts.controller import Interrupts
from device.interrupts.kinds import IrqFlags, IrqIndex, IrqKind
from device.pci.bars import Accesses, Bar, BarKind, Data, Handler
from device.pci.capabilities import Capability, Msi, Msix, PowerManagement
from device.pci.capabilities.base import arrange, place_all
from device.pci.capabilities.pm import D0, PmControl
from device.pci.config_space import CONFIG_SIZE, Command, ConfigSpace, Status
from device.pci.memory_bar import MemoryBar
from device.revocation import Revocation

if TYPE_CHECKING:
    from device.migration.migration import Migration

__all__ = [
    "Accesses",
    "Bar",
    "BarKind",
    "Data",
    "DeviceError",
    "Handler",
    "Identity",
    "IoEventFdArea",
    "IrqFlags",
    "IrqIndex",
    "IrqKind",
    "MemoryBar",
    "PciFunction",
    "Region",
    "RegionIndex",
    "ResetKind",
    "Revocation",
]

log = logging.getLogger(__name__)


class ResetKind(Enum):
    """Why the function goes back to its power-on state."""

    DEVICE = "the client sent DEVICE_RESET"
    FLR = "software initiated a function level reset"
    LOST_CLIENT = "the client is gone, and with it its eventfds, DMA windows and BAR mappings"


class RegionIndex(IntEnum):
    """Index of a region (VFIO_PCI_*_REGION_INDEX)."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


@dataclass(frozen=True, slots=True)
class Region:
    """`size` bytes the host may access; 0 when absent.

    `mmap_areas` (offset, size) of `fd` may be mapped, whole pages each but where the region is less than one.
    """

    size: int
    readable: bool
    writable: bool
    fd: int | None = None
    mmap_areas: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class IoEventFdArea:
    """Writes of `size` bytes at byte `offset` of a region that signalling the eventfd `fd` can stand for.

    Only those of the value `datamatch`, unless that is None. The fd is the function's.
    """

    offset: int
    size: int
    fd: int
    datamatch: int | None = None


_ABSENT = Region(0, readable=False, writable=False)


def _nothing(*_what: object) -> None:
    pass


class PciFunction:
    """A function named `name`, made of `bars` and `capabilities` (listed in that order).

    The interrupt pin 0 means no INTx. Without `command_memory` BARs are decoded whatever COMMAND.MEMORY says,
    as those of a virtual function are (PCI Express Base 5.0, 9.3.4.1.3).

    ValueError when the parts do not fit together: BARs that overlap, capabilities beyond 256 bytes,
    structures outside their BAR, memory BARs with different ways of revocation.

    While the function does not decode its BARs and memory BARs enforce that, region accesses to any BAR are
    refused with EIO, as the kernel does (drivers/vfio/pci/vfio_pci_rdwr.c); else they do not ask. Doorbells
    by eventfd are heard in any case: they only make a card look at queues, which it may do at any time.

    Hooks, all called with the gate held: `on_reset(kind)` before anything else changes, so that the card can
    stop its workers' queues; `on_bus_master(enabled)` when software allows or forbids the function to do DMA:
    a card does none while it is forbidden; `on_stop()` and `on_run()` when the function was stopped and
    before it runs again: a card that is stopped does no DMA and keeps its state as it is, but for what
    register accesses ask of it, and one that runs again looks at everything it may have missed.

    `migration` moves the function's state to another one, if it can be moved.
    """

    def __init__(
        self,
        name: str,
        identity: Identity,
        *,
        bars: Iterable[Bar | MemoryBar] = (),
        capabilities: Iterable[Capability] = (),
        interrupt_pin: int = 1,
        dma: DmaWindows | None = None,
        command_memory: bool = True,
    ) -> None:
        self.name = name
        self.gate = Gate()
        self.dma = DmaWindows() if dma is None else dma
        self.dma.gate = self.gate
        self.on_reset: Callable[[ResetKind], None] = _nothing
        self.on_bus_master: Callable[[bool], None] = _nothing
        self.on_stop: Callable[[], None] = _nothing
        self.on_run: Callable[[], None] = _nothing
        self.running = True
        self.migration: Migration | None = None
        self.doorbells: Mapping[int, Sequence[IoEventFdArea]] = {}
        self.capabilities = tuple(capabilities)
        bars = tuple(bars)
        self.bars: dict[int, Bar | MemoryBar] = {bar.index: bar for bar in bars}
        offsets = arrange(self.capabilities)
        self.config = ConfigSpace(
            identity, bars, interrupt_pin=interrupt_pin, first_capability=offsets[0] if offsets else 0
        )
        place_all(self.config, self.capabilities, offsets)
        self.interrupts = Interrupts(
            pin=interrupt_pin > 0,
            msi=max((part.vectors for part in self.capabilities if isinstance(part, Msi)), default=0),
            msix=max((part.vectors for part in self.capabilities if isinstance(part, Msix)), default=0),
        )
        self._command_memory = command_memory
        self._memory = [bar for bar in bars if isinstance(bar, MemoryBar)]
        if len({bar.revocation for bar in self._memory}) > 1:
            raise ValueError("memory BARs of one function have one way of revocation")
        self._enforced = any(bar.revocation is Revocation.ENFORCED for bar in self._memory)
        self._silent = False
        self._power = next((part for part in self.capabilities if isinstance(part, PowerManagement)), None)
        for bar in bars:
            if isinstance(bar, Bar):
                bar.gate = self.gate
        for part in self.capabilities:
            part.connect(self)
        self.config.before_read(ConfigSpace.STATUS, Status.SIZE, self._show_status)
        self.config.after_write(ConfigSpace.COMMAND, Command.SIZE, self._command_written)
        if self._power is not None:
            self.config.after_write(self._power.at("CONTROL"), PmControl.SIZE, self._follow_decoding)
        self._reads: dict[int, Callable[[int, int], bytes]] = {
            index: bar.read for index, bar in self.bars.items()
        }
        self._writes: dict[int, Callable[[int, Data], None]] = {
            index: bar.write for index, bar in self.bars.items()
        }
        self._reads[RegionIndex.CONFIG] = self._config_read
        self._writes[RegionIndex.CONFIG] = self._config_write
        self._follow_decoding()

    # --- regions

    def regions(self) -> Sequence[Region]:
        """All nine, in the order of RegionIndex. A memory BAR has another fd after reset(LOST_CLIENT)."""
        return [self._region(index) for index in RegionIndex]

    def _region(self, index: RegionIndex) -> Region:
        if index is RegionIndex.CONFIG:
            return Region(CONFIG_SIZE, readable=True, writable=True)
        bar = self.bars.get(index)
        if bar is None:
            return _ABSENT
        areas = bar.mmap_areas if isinstance(bar, MemoryBar) else ()
        return Region(bar.size, readable=True, writable=True, fd=bar.fd, mmap_areas=areas)

    def region_read(self, index: int, offset: int, count: int) -> bytes:
        """Read `count` bytes at byte `offset`.

        DeviceError: EINVAL when the region does not have them, EIO when it does not answer.
        """
        try:
            read = self._reads[index]
        except KeyError:
            raise DeviceError(errno.EINVAL, f"there is no region {index}") from None
        if self._silent:
            self._refuse_undecoded(index, offset, count)
        return read(offset, count)

    def region_write(self, index: int, offset: int, data: Data) -> None:
        """Write `data` at byte `offset`; refusals as those of `region_read`."""
        try:
            write = self._writes[index]
        except KeyError:
            raise DeviceError(errno.EINVAL, f"there is no region {index}") from None
        if self._silent:
            self._refuse_undecoded(index, offset, len(data))
        write(offset, data)

    def interpose(self, index: int, between: Callable[[Accesses], Accesses]) -> None:
        """Let what `between` makes of them answer accesses to region `index`, in their place.

        Accesses that are refused because BARs are not decoded do not get there. KeyError if there is no such
        region.
        """
        made = between(self.region_accesses(index))
        self._reads[index], self._writes[index] = made.read, made.write

    def region_accesses(self, index: int) -> Accesses:
        """What answers accesses to region `index`, decoded or not; KeyError if there is no such region."""
        return Accesses(self._reads[index], self._writes[index])

    def _refuse_undecoded(self, index: int, offset: int, count: int) -> None:
        bar = self.bars.get(index)
        if bar is not None and 0 <= offset <= bar.size - count:
            raise DeviceError(errno.EIO, f"BAR {index} is not decoded")

    def io_eventfds(self, index: int) -> Sequence[IoEventFdArea]:
        """The parts of region `index` that eventfds can stand for; DeviceError(EINVAL) if there is no region.

        Signals count as writes only while the card's program runs.
        """
        if index not in self._reads:
            raise DeviceError(errno.EINVAL, f"there is no region {index}")
        return self.doorbells.get(index, ())

    def _config_read(self, offset: int, count: int) -> bytes:
        with self.gate:
            return self.config.read(offset, count)

    def _config_write(self, offset: int, data: Data) -> None:
        with self.gate:
            self.config.write(offset, data)

    # --- configuration space's effects

    @property
    def bus_master(self) -> bool:
        """Whether software lets the function do DMA."""
        return bool(self.config.command & Command.BUS_MASTER.mask)

    @property
    def memory_enabled(self) -> bool:
        """Whether the function decodes its BARs: COMMAND says so, in D0."""
        powered = self._power is None or self._power.power_state == D0
        return powered and (not self._command_memory or bool(self.config.command & Command.MEMORY.mask))

    def _follow_decoding(self, *_registers: int) -> None:
        """Let the BARs follow `memory_enabled`, which may be another one now; DeviceError if one could not.
        Nobody else tells them.
        """
        decoded = self.memory_enabled
        self._silent = self._enforced and not decoded
        with ExitStack() as each:  # no failure of one may leave another one mapped
            for bar in self._memory:
                each.callback(bar.decode, decoded)

    def _show_status(self) -> None:
        status = self.config.load(ConfigSpace.STATUS, Status.SIZE)
        level = int(self.interrupts.lines.intx_asserted)
        self.config.store(ConfigSpace.STATUS, Status.SIZE, Status.INTERRUPT.put(status, level))

    def _command_written(self, old: int, new: int) -> None:
        self.interrupts.line.disable(bool(new & Command.INTX_DISABLE.mask))
        if (old ^ new) & Command.BUS_MASTER.mask:
            self.on_bus_master(bool(new & Command.BUS_MASTER.mask))
        self._follow_decoding()

    # --- interrupts

    def irqs(self) -> Sequence[IrqIndex]:
        """All five, in the order of IrqKind."""
        return self.interrupts.indexes()

    def irq_set_trigger(self, index: int, start: int, fds: Sequence[int | None]) -> None:
        """Wire borrowed eventfds (None: unplug) to the interrupts from `start` on; all or none.

        DeviceError: EINVAL for interrupts that do not exist, files that are no eventfds, or while another of
        INTx, MSI and MSI-X is wired; EBADF for a closed fd.
        """
        with self.gate:
            self.interrupts.set_trigger(index, start, fds)

    def irq_disable(self, index: int) -> None:
        """Unplug all interrupts of an index; DeviceError(EINVAL) only for an index that does not exist."""
        with self.gate:
            self.interrupts.disable(index)

    def irq_trigger(self, index: int, start: int, which: Sequence[bool]) -> None:
        """Signal the chosen interrupts as a test, past all masks.

        DeviceError(EINVAL) unless the index is wired.
        """
        with self.gate:
            self.interrupts.trigger(index, start, which)

    def irq_mask(self, index: int, start: int, which: Sequence[bool]) -> None:
        """Hold back the chosen interrupts; DeviceError.

        EINVAL if they do not exist or INTx is not wired, ENOTTY for ERR and REQ.
        """
        with self.gate:
            self.interrupts.mask(index, start, which)

    def irq_unmask(self, index: int, start: int, which: Sequence[bool]) -> None:
        """Let go the chosen interrupts; those that waited are signalled. Refusals as those of `irq_mask`."""
        with self.gate:
            self.interrupts.unmask(index, start, which)

    def irq_set_unmask_fd(self, index: int, fd: int | None) -> None:
        """Let a borrowed eventfd unmask INTx, instead of an earlier one; None stops that.

        DeviceError: EINVAL while INTx is not wired, or no eventfd; ENOTTY for any other index.
        """
        with self.gate:
            self.interrupts.set_unmask_fd(index, fd)

    @property
    def unmask_fd(self) -> int | None:
        """The eventfd to watch for `unmask_fd_fired`. Ours.

        It changes whenever INTx is wired, disabled or reset(LOST_CLIENT).
        """
        return self.interrupts.line.unmask_fd

    def unmask_fd_fired(self) -> None:
        """`unmask_fd` is readable: unmask INTx. Never blocks; does nothing if it was not readable."""
        with self.gate:
            self.interrupts.line.unmask_fd_fired()

    def request_release(self) -> bool:
        """Ask the client to give the function up (REQ); whether it listens."""
        with self.gate:
            return self.interrupts.raise_single(IrqKind.REQ)

    def report_error(self) -> bool:
        """Tell the client of an error that cannot be recovered (ERR); whether it listens."""
        with self.gate:
            return self.interrupts.raise_single(IrqKind.ERR)

    def poison(self, index: int, offset: int) -> bool:
        """Lose a page of a memory BAR, see `MemoryBar.poison`, and report it; whether the client listens.

        DeviceError: what `MemoryBar.poison` raises, or EINVAL if BAR `index` is none.
        """
        bar = self.bars.get(index)
        if not isinstance(bar, MemoryBar):
            raise DeviceError(errno.EINVAL, f"there is no memory in BAR {index}")
        with self.gate:
            bar.poison(offset)
            return self.report_error()

    # --- life

    def stop(self) -> None:
        """No DMA and no interrupt from now on, until `run`; register accesses are served all the same."""
        with self.gate:
            if self.running:
                self.running = False
                self.dma.disturb()
                self.interrupts.silence()
                self.on_stop()

    def run(self) -> None:
        """Go on after `stop`; interrupts that came up meanwhile are signalled once."""
        with self.gate:
            if not self.running:
                self.running = True
                self.on_run()
                self.interrupts.speak()

    def reset(self, kind: ResetKind) -> None:
        """Back to power-on values.

        Configuration space with BARs and COMMAND, interrupt levels, MSI-X table, memory BARs.

        DEVICE and FLR keep the eventfds, the client's masks and the DMA windows, as vfio-pci does, for they
        are the client's: it goes on using them. LOST_CLIENT drops them and the log of written pages, and
        gives memory BARs new memory, so that mappings left behind reach the next client's card no more.

        DEVICE and LOST_CLIENT let a stopped function run again and end a migration. FLR does not: it is the
        driver's, who must not know of either.

        OSError from LOST_CLIENT: what is to be new cannot be made for now, so the old client may still share
        memory or eventfds with the card. All else is done, and the reset is to be tried again before anybody
        else gets the card.
        """
        with self.gate:
            log.info("%s: reset, %s", self.name, kind.value)
            try:
                self.on_reset(kind)
            finally:
                self._reset(kind)

    def _reset(self, kind: ResetKind) -> None:
        self.dma.disturb()
        lost = kind is ResetKind.LOST_CLIENT
        if lost:
            self.interrupts.unwire_all()
            self.dma.unmap_all()
            self.dma.log_stop()
        self.interrupts.reset()
        try:
            with ExitStack() as each:  # before the registers, which say whether mappings come back
                for bar in self._memory:
                    each.callback(bar.renew if lost else bar.clear)
        finally:
            self.replace_registers(self.config.reset)
            if kind is not ResetKind.FLR:
                if self.migration is not None:
                    self.migration.reset()
                self.run()

    def replace_registers(self, replace: Callable[[], None]) -> None:
        """Let `replace` change configuration space past its hooks, and follow the new values.

        The gate is held.
        """
        command = self.config.command
        replace()
        for part in self.capabilities:
            part.adopt()
        self._command_written(command, self.config.command)

    def function_level_reset(self) -> None:
        """`reset(ResetKind.FLR)`, for the PCI Express capability."""
        self.reset(ResetKind.FLR)

    def close(self) -> None:
        """Give back every fd and all memory. The function is of no use afterwards.

        Closing it twice does nothing.
        """
        with self.gate:
            if self.migration is not None:
                self.migration.reset()
            self.interrupts.unwire_all()
            self.dma.unmap_all()
            for bar in self.bars.values():
                bar.close()
            self.bars.clear()
            self._memory.clear()
            self._reads.clear()
            self._writes.clear()
