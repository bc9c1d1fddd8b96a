"""KVM's interrupt controllers as irqchips: the 8259A pair and the I/O APIC of one VM, or an I/O APIC of ours
in front of KVM's local APICs.

Eventfds go straight into the kernel (KVM_IRQFD): a device's interrupt reaches the guest without us. Those of
an inactive chip are left alone, and what they count waits until it is active again.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from client._eventfd import identity, signal
from client.irqchip._attachment import Attachment
from client.irqchip.chip import Irqchip, IrqchipError
from client.irqchip.registers import IOAPIC_INPUTS, PIC_CASCADE, PIC_HALF, PIC_INPUTS
from client.kvm.errors import KvmError
from client.kvm.realmode import APIC_VECTORS
from client.kvm.routing import Chip, IrqchipRoute, MsiRoute, Route
from client.kvm.vm import Vm


@contextmanager
def _refused() -> Iterator[None]:
    """KVM's refusals as an irqchip's."""
    try:
        yield
    except KvmError as error:
        raise IrqchipError(error.doing, error.errno) from None


class KvmChip(Irqchip):
    """What they have in common. Not active at first; raises IrqchipError with KVM's errno.

    Several may be made over one VM: its inputs lead to the one that is active.
    """

    def __init__(self, vm: Vm, name: str, inputs: int) -> None:
        self.vm: Final = vm
        self.name = name
        self.inputs = inputs
        self.active = False
        self._wires: dict[tuple[int, int], Attachment] = {}
        self._high: set[int] = set()

    @abstractmethod
    def _route(self, gsi: int) -> Route:
        """Where an input of the VM leads while this chip is active."""

    @abstractmethod
    def _plug(self, wire: Attachment) -> None:
        """Give an input's eventfds to KVM."""

    @abstractmethod
    def _drive(self, gsi: int, level: bool) -> None:
        """Tell KVM an input's level."""

    def activate(self) -> None:
        """The VM's inputs lead here and nowhere else. Who was attached when this chip was left, and is still,
        hears its resample eventfd: the level was taken down, and may have to be raised again.
        """
        if self.active:
            return
        with _refused():
            self.vm.set_routes([self._route(gsi) for gsi in range(self.inputs)])
            self.active = True
            try:
                for wire in self._wires.values():
                    self._plug(wire)
                for gsi in self._high:
                    self._drive(gsi, True)
            except KvmError:
                self.deactivate()
                raise
        for wire in self._wires.values():
            if wire.asserted:
                wire.asserted = False
                signal(wire.resample_fd)

    def deactivate(self) -> None:
        """The VM's inputs lead nowhere. Before that all are taken down, for later nobody could."""
        if not self.active:
            return
        self.active = False
        with _refused():
            for wire in self._wires.values():
                self.vm.remove_irqfd(wire.gsi, wire.trigger_fd)
                wire.asserted = True  # for all we know
            for gsi in self._high:
                self._drive(gsi, False)
            self.vm.set_routes([])

    def attach(self, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        """KVM_IRQFD."""
        self._check(gsi)
        if identity(trigger_fd) in {attached for _, attached in self._wires}:
            raise IrqchipError(f"{self.name}: this eventfd is attached already", errno.EBUSY)
        wire = Attachment(gsi, trigger_fd, resample_fd)
        try:
            if self.active:
                with _refused():
                    self._plug(wire)
        except BaseException:
            wire.close()
            raise
        self._wires[gsi, wire.identity] = wire

    def detach(self, gsi: int, trigger_fd: int) -> None:
        """KVM_IRQFD_FLAG_DEASSIGN."""
        wire = self._wires.pop((gsi, identity(trigger_fd) or 0), None)
        if wire is None:
            return
        try:
            if self.active:
                with _refused():
                    self.vm.remove_irqfd(gsi, wire.trigger_fd)
        finally:
            wire.close()

    def set_level(self, gsi: int, level: bool) -> None:
        """KVM_IRQ_LINE."""
        self._check(gsi)
        if level == (gsi in self._high):
            return
        if self.active:
            with _refused():
                self._drive(gsi, level)
        (self._high.add if level else self._high.discard)(gsi)

    def close(self) -> None:
        """Let go of everything; the VM may have been closed before."""
        with suppress(IrqchipError):
            self.deactivate()
        for wire in self._wires.values():
            wire.close()
        self._wires.clear()

    def _check(self, gsi: int) -> None:
        if not self.has_input(gsi):
            raise IrqchipError(f"{self.name} has no input {gsi}", errno.EINVAL)


class _InKernel(KvmChip):
    """A chip whose levels and ends of interrupt are KVM's affair."""

    def _plug(self, wire: Attachment) -> None:
        self.vm.irqfd(wire.gsi, wire.trigger_fd, wire.resample_fd)

    def _drive(self, gsi: int, level: bool) -> None:
        self.vm.irq_line(gsi, level)


class KvmPic(_InKernel):
    """The 8259A pair of a VM with the irqchip in the kernel."""

    def __init__(self, vm: Vm) -> None:
        super().__init__(vm, "kvm-pic", PIC_INPUTS)

    def has_input(self, gsi: int) -> bool:
        """Not that of the cascade, which KVM would take."""
        return gsi != PIC_CASCADE and super().has_input(gsi)

    def _route(self, gsi: int) -> Route:
        if gsi < PIC_HALF:
            return IrqchipRoute(gsi, Chip.PIC_MASTER, gsi)
        return IrqchipRoute(gsi, Chip.PIC_SLAVE, gsi - PIC_HALF)


class KvmIoapic(_InKernel):
    """The I/O APIC of a VM with the irqchip in the kernel."""

    def __init__(self, vm: Vm) -> None:
        super().__init__(vm, "kvm-ioapic", IOAPIC_INPUTS)

    def _route(self, gsi: int) -> Route:
        return IrqchipRoute(gsi, Chip.IOAPIC, gsi)


class KvmSplit(KvmChip):
    """The I/O APIC of a VM with a split irqchip: input n is vector `first_vector` + n at local APIC 0.

    KVM has no resample eventfd there (KVM_IRQFD says EINVAL), but exits at the end of interrupt; who runs the
    VM's processors makes this chip hear of it, which then signals the eventfds itself.
    """

    def __init__(self, vm: Vm, first_vector: int = APIC_VECTORS) -> None:
        super().__init__(vm, "kvm-split", IOAPIC_INPUTS)
        self._first_vector: Final = first_vector
        vm.eoi_listeners.append(self._ended)

    def _route(self, gsi: int) -> MsiRoute:
        return MsiRoute(gsi, self._first_vector + gsi, level=True)

    def _plug(self, wire: Attachment) -> None:
        self.vm.irqfd(wire.gsi, wire.trigger_fd)

    def _drive(self, gsi: int, level: bool) -> None:
        if level:  # a message that went cannot be taken back
            route = self._route(gsi)
            self.vm.signal_msi(route.address, route.data)

    def _ended(self, vector: int) -> None:
        gsi = vector - self._first_vector
        if not self.active:
            return
        for wire in self._wires.values():
            if wire.gsi == gsi:
                signal(wire.resample_fd)
        if gsi in self._high:
            self._drive(gsi, True)

    def close(self) -> None:
        """Let go of everything, and hear of nothing any more."""
        super().close()
        if self._ended in self.vm.eoi_listeners:
            self.vm.eoi_listeners.remove(self._ended)
