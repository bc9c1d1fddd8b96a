"""INTx: a level, its eventfds, and the kernel's rules for them (drivers/vfio/pci/vfio_pci_intrs.c).

The level and its masks are in `Lines`, where data-path workers pull them: a line that is asserted, wired,
unmasked and not disabled masks itself and signals once; unmasking it while it is still asserted signals again
and leaves it masked.
"""

from device.interrupts._eventfd import drain, release, waiting
from device.interrupts._lines import Lines


class Intx:
    """The wiring of the line: the eventfd it signals, and the one that unmasks it (KVM's resamplefd).

    In the kernel an eventfd unmasks while it is signalled. Here somebody has to look, so whatever asks for
    the order of unmasking and another step looks first.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.fd: int | None = None
        self.unmask_fd: int | None = None

    def enable(self) -> None:
        """INTx is the active index from now on."""
        self.lines.intx_enable()

    def mask(self) -> None:
        """Mask by the host's word."""
        self.unmask_fd_fired()
        self.lines.intx_mask()

    def disable(self, disabled: bool) -> None:
        """Follow COMMAND.INTX_DISABLE."""
        if disabled != self.lines.intx_disabled:
            self.unmask_fd_fired()
            self.lines.intx_disable(disabled)

    def wire(self, fd: int | None) -> None:
        """Signal `fd`, which is closed one day, from now on; None leaves the line without a listener.

        A line that had signalled the old one and was not unmasked since signals the new one, because whoever
        held the old one may not have read it; but not if `fd` has a signal already that nobody has read. That
        is more than the kernel does, which awaits UNMASK. What the host masked stays masked, as there.
        """
        old, self.fd = self.fd, fd
        self.lines.set_intx_fd(-1)
        self.unmask_fd_fired()
        if fd is not None:
            if not (self.lines.intx_asserted and waiting(fd)):
                self.lines.intx_reopen()
            self.lines.set_intx_fd(fd)
        release(old)

    def unwire(self) -> None:
        """Forget both eventfds."""
        self.wire(None)
        self.wire_unmask(None)

    def wire_unmask(self, fd: int | None) -> None:
        """Let `fd`, which is closed one day, unmask the line.

        What was signalled on the old one counts, and so does what `fd` was signalled before (as in
        vfio_virqfd_enable). It replaces an earlier one, where the kernel says EBUSY: over a socket nobody
        sees that the client closed its copy.
        """
        self.unmask_fd_fired()
        old, self.unmask_fd = self.unmask_fd, fd
        release(old)
        self.unmask_fd_fired()

    def unmask_fd_fired(self) -> None:
        """Unmask if `unmask_fd` was signalled since the last time."""
        if self.unmask_fd is not None and drain(self.unmask_fd):
            self.lines.intx_unmask()
