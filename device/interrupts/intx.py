"""INTx: a level, its eventfds, and the kernel's rules for them (drivers/vfio/pci/vfio_pci_intrs.c).

The level and its masks are in `Lines`, where data-path workers pull them: a line that is asserted, wired,
unmasked and not disabled masks itself and signals once; unmasking it while it is still asserted signals again
and leaves it masked.
"""

from device.interrupts._eventfd import drain, release
from device.interrupts._lines import Lines


class Intx:
    """The wiring of the line: the eventfd it signals, and the one that unmasks it (KVM's resamplefd)."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.fd: int | None = None
        self.unmask_fd: int | None = None

    def wire(self, fd: int | None) -> None:
        """Signal `fd`, which is closed one day, from now on; None leaves the line without a listener."""
        old, self.fd = self.fd, fd
        self.lines.set_intx_fd(-1 if fd is None else fd)
        release(old)

    def unwire(self) -> None:
        """Forget both eventfds."""
        self.wire(None)
        self.wire_unmask(None)

    def wire_unmask(self, fd: int | None) -> None:
        """Let `fd`, which is closed one day, unmask the line.

        It replaces an earlier one, where the kernel says EBUSY: over a socket nobody sees that the client
        closed its copy.
        """
        old, self.unmask_fd = self.unmask_fd, fd
        release(old)

    def unmask_fd_fired(self) -> None:
        """Unmask if `unmask_fd` was signalled since the last time."""
        if self.unmask_fd is not None and drain(self.unmask_fd):
            self.lines.intx_unmask()
