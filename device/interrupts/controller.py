"""All interrupts of a function: who is wired, who may speak.

INTx, MSI and MSI-X exclude each other: the one whose eventfds were set last is active until it is disabled,
and wiring another one meanwhile is refused, as in the kernel (is_irq_none). Wiring by SET_IRQS counts as
enabled, whatever the enable bits in configuration space say, because clients differ in which they write
first.

Nothing here locks: callers hold the card's gate. A method that refuses has changed nothing.
"""

import errno
from collections.abc import Callable, Sequence

from device.errors import DeviceError
from device.interrupts._eventfd import borrow, release
from device.interrupts._lines import Lines, signal
from device.interrupts.intx import Intx
from device.interrupts.kinds import IrqFlags, IrqIndex, IrqKind
from device.interrupts.msi import MsiBank
from device.interrupts.msix import MsixBank

_EXCLUSIVE = (IrqKind.INTX, IrqKind.MSI, IrqKind.MSIX)

# As vfio_pci_ioctl_get_irq_info answers, and MASKABLE for vectors besides, which the kernel cannot mask but
# we can. MSI vectors are a block that cannot grow while it is wired; MSI-X vectors come and go one by one.
_FLAGS = {
    IrqKind.INTX: IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.AUTOMASKED,
    IrqKind.MSI: IrqFlags.EVENTFD | IrqFlags.MASKABLE | IrqFlags.NORESIZE,
    IrqKind.MSIX: IrqFlags.EVENTFD | IrqFlags.MASKABLE,
    IrqKind.ERR: IrqFlags.EVENTFD | IrqFlags.NORESIZE,
    IrqKind.REQ: IrqFlags.EVENTFD | IrqFlags.NORESIZE,
}


class Interrupts:
    """The interrupts of a function with `msi` and `msix` vectors and, if `pin`, INTx."""

    def __init__(self, *, pin: bool = True, msi: int = 0, msix: int = 0) -> None:
        self.lines = Lines(max(msi, msix))
        self.line = Intx(self.lines)
        self.msi = MsiBank(self.lines, msi)
        self.msix = MsixBank(self.lines, msix)
        self.active: IrqKind | None = None
        self._banks: dict[IrqKind, MsiBank | MsixBank] = {IrqKind.MSI: self.msi, IrqKind.MSIX: self.msix}
        self._single: dict[IrqKind, int | None] = {IrqKind.ERR: None, IrqKind.REQ: None}
        counts = {
            IrqKind.INTX: int(pin),
            IrqKind.MSI: msi,
            IrqKind.MSIX: msix,
            IrqKind.ERR: 1,
            IrqKind.REQ: 1,
        }
        self._counts = counts
        self._indexes = tuple(
            IrqIndex(counts[kind], _FLAGS[kind] if counts[kind] else IrqFlags(0)) for kind in IrqKind
        )

    def indexes(self) -> tuple[IrqIndex, ...]:
        """What GET_IRQ_INFO says, in the order of IrqKind."""
        return self._indexes

    # --- the card's side

    def signal(self, vector: int) -> None:
        """Interrupt the driver.

        MSI-X fires `vector`, MSI that one or, when fewer are wired, the first, INTx goes high.

        A vector that does not exist, such as VIRTIO_MSI_NO_VECTOR, interrupts nobody.
        """
        mode = self.lines.mode
        if mode == IrqKind.MSIX:
            if vector < self.msix.count:
                self.lines.vector_fire(vector)
        elif mode == IrqKind.MSI:
            self.lines.vector_fire(vector if vector < self.msi.allocated else 0)
        else:
            self.lines.intx_assert()

    def intx(self, level: bool) -> None:
        """Drive INTx."""
        if level:
            self.lines.intx_assert()
        else:
            self.lines.intx_deassert()

    def raise_single(self, kind: IrqKind) -> bool:
        """Signal ERR or REQ; whether anybody is listening."""
        fd = self._single[kind]
        if fd is None:
            return False
        signal(fd)
        return True

    # --- what configuration space says

    def configure_msi(self, *, enabled: bool, mask: int) -> None:
        """Follow the MSI capability."""
        self.msi.configure(enabled=enabled, mask=mask)
        self._choose_mode()

    def configure_msix(self, *, enabled: bool, function_mask: bool) -> None:
        """Follow the MSI-X capability."""
        self.msix.configure(enabled=enabled, function_mask=function_mask)
        self._choose_mode()

    def reset(self) -> None:
        """Levels, pending bits and the MSI-X table to power-on values.

        The wiring and the client's masks stay.
        """
        self.lines.reset()
        self.msix.reset()

    def silence(self) -> None:
        """Signal nothing until `speak`, whatever the card or the client does; tests by `trigger` pass."""
        self.lines.silent = True

    def speak(self) -> None:
        """Signal what has waited since `silence`, and from now on as it comes."""
        self.lines.silent = False
        for bank in self._banks.values():
            bank.refresh_all()
        if self.lines.intx_asserted:
            self.lines.intx_assert()

    def save(self) -> bytes:
        """What the card has to say: levels, pending bits, MSI-X table. Wiring and masks are the client's."""
        lines = self.lines
        pending = bytes(lines.vector_pending(vector) for vector in range(lines.vectors))
        return bytes((lines.isr, lines.intx_asserted)) + pending + self.msix.save()

    def stage(self, data: bytes) -> Callable[[], None]:
        """What makes this state that of `data`, which another card saved; ValueError if it cannot be."""
        lines = self.lines
        start, pending, rest = data[:2], data[2 : 2 + lines.vectors], data[2 + lines.vectors :]
        if len(start) != 2 or start[1] > 1 or not set(pending) <= {0, 1}:
            raise ValueError("levels that are neither high nor low")
        apply_msix = self.msix.stage(rest)

        def apply() -> None:
            lines.reset()
            lines.isr = start[0]
            for vector in range(lines.vectors):
                if pending[vector]:
                    lines.vector_latch(vector)
            if start[1]:
                lines.intx_assert()
            apply_msix()

        return apply

    def _choose_mode(self) -> None:
        if self.active is not None:
            kind = self.active
        elif self.msix.enabled:
            kind = IrqKind.MSIX
        elif self.msi.enabled:
            kind = IrqKind.MSI
        else:
            kind = IrqKind.INTX
        for other, bank in self._banks.items():
            if bank.active and other is not kind:
                bank.leave()
        for other, bank in self._banks.items():
            if not bank.active and other is kind:
                bank.enter()
        self.lines.mode = int(kind)

    # --- SET_IRQS

    def set_trigger(self, index: int, start: int, fds: Sequence[int | None]) -> None:
        """Wire `fds`, borrowed eventfds or None, to the interrupts from `start` on (DATA_EVENTFD,
        ACTION_TRIGGER).

        DeviceError(EINVAL): no such interrupts, another kind is active, or MSI would grow; EBADF, EINVAL: not
        eventfds.
        """
        kind = self._kind(index, start, len(fds))
        if not fds:
            raise DeviceError(errno.EINVAL, f"{kind.name}: no eventfds to wire")
        if kind in _EXCLUSIVE and self.active not in (None, kind):
            raise DeviceError(errno.EINVAL, f"{kind.name} cannot be wired while {self._name(self.active)} is")
        if kind is IrqKind.MSI and self.active is kind and start + len(fds) > self.msi.allocated:
            raise DeviceError(
                errno.EINVAL,
                f"MSI is wired with {self.msi.allocated} vectors and cannot grow to {start + len(fds)}",
            )
        borrowed = _borrow_all(fds)
        if kind in self._single:
            release(self._single[kind])
            self._single[kind] = borrowed[0]
            return
        first = self.active is None
        if first:
            self.active = kind
            self._choose_mode()
        if kind is IrqKind.INTX:
            if first:
                self.line.enable()
            self.line.wire(borrowed[0])
            return
        bank = self._banks[kind]
        if first:
            bank.allocated = start + len(fds)
        bank.wire(start, borrowed)

    def disable(self, index: int) -> None:
        """Unplug all interrupts of an index (DATA_NONE, ACTION_TRIGGER, count 0).

        An index that is not active has nothing to unplug: that succeeds, as libvfio-user has it, where the
        kernel says EINVAL.
        """
        kind = self._kind(index, 0, 0)
        if kind in self._single:
            release(self._single[kind])
            self._single[kind] = None
        elif kind is self.active:
            if kind is IrqKind.INTX:
                self.line.unwire()
            else:
                self._banks[kind].unwire()
            self.active = None
            self._choose_mode()

    def trigger(self, index: int, start: int, which: Sequence[bool]) -> None:
        """Signal the eventfds of the interrupts that are true in `which`, past all masks.

        A test of the wiring.

        DeviceError(EINVAL) when the index is not active. As in the kernel, INTx stays silent while COMMAND
        disables it.
        """
        kind = self._kind(index, start, len(which))
        if kind in self._single:
            if self._single[kind] is None:
                raise DeviceError(errno.EINVAL, f"{kind.name} is not wired")
            if any(which):
                self.raise_single(kind)
            return
        self._require_active(kind)
        for vector, chosen in enumerate(which, start):
            fd = self.line.fd if kind is IrqKind.INTX else self._banks[kind].fd(vector)
            if chosen and fd is not None and not (kind is IrqKind.INTX and self.lines.intx_disabled):
                signal(fd)

    def mask(self, index: int, start: int, which: Sequence[bool]) -> None:
        """Hold back the interrupts that are true in `which`.

        DeviceError(ENOTTY) for ERR and REQ, EINVAL for INTx unless active.
        """
        self._hold(index, start, which, True)

    def unmask(self, index: int, start: int, which: Sequence[bool]) -> None:
        """Let go what `mask` held back; what waits for it is signalled."""
        self._hold(index, start, which, False)

    def _hold(self, index: int, start: int, which: Sequence[bool], held: bool) -> None:
        kind = self._kind(index, start, len(which))
        if kind in self._single:
            raise DeviceError(errno.ENOTTY, f"{kind.name} cannot be masked")
        if kind is not IrqKind.INTX:
            self._banks[kind].hold(start, which, held)
            return
        self._require_active(kind)
        if any(which):
            if held:
                self.line.mask()
            else:
                self.lines.intx_unmask()

    def set_unmask_fd(self, index: int, fd: int | None) -> None:
        """Let the borrowed eventfd `fd` unmask INTx (DATA_EVENTFD, ACTION_UNMASK); None stops that.

        DeviceError(ENOTTY) for another index, EINVAL while INTx is not active.
        """
        kind = self._kind(index, 0, 1)
        if kind is not IrqKind.INTX:
            raise DeviceError(errno.ENOTTY, f"{kind.name} has no eventfd to unmask it")
        self._require_active(kind)
        self.line.wire_unmask(None if fd is None else borrow(fd))

    def unwire_all(self) -> None:
        """Forget every eventfd and mask of a client that is gone."""
        for kind in IrqKind:
            if self._counts[kind]:
                self.disable(kind)
        for bank in self._banks.values():
            bank.unwire()

    # --- checks

    def _kind(self, index: int, start: int, count: int) -> IrqKind:
        if not 0 <= index < len(IrqKind):
            raise DeviceError(errno.EINVAL, f"there is no interrupt index {index}")
        kind = IrqKind(index)
        if start < 0 or start + count > self._counts[kind]:
            raise DeviceError(
                errno.EINVAL,
                f"{kind.name}: {count} interrupts from {start} on, there are {self._counts[kind]}",
            )
        return kind

    def _require_active(self, kind: IrqKind) -> None:
        if self.active is not kind:
            raise DeviceError(errno.EINVAL, f"{kind.name} is not wired, {self._name(self.active)} is")

    @staticmethod
    def _name(kind: IrqKind | None) -> str:
        return "nothing" if kind is None else kind.name


def _borrow_all(fds: Sequence[int | None]) -> list[int | None]:
    """Duplicates of all `fds`, or of none."""
    borrowed: list[int | None] = []
    try:
        for fd in fds:
            borrowed.append(None if fd is None else borrow(fd))
    except DeviceError:
        for fd in borrowed:
            release(fd)
        raise
    return borrowed
