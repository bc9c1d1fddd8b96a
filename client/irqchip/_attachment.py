"""Two eventfds on an input of an irqchip."""

from __future__ import annotations

import errno
import os

from client._eventfd import identity
from client.irqchip.chip import IrqchipError


class Attachment:
    """What `Irqchip.attach` was given, by descriptors of our own.

    Raises IrqchipError: EINVAL for what is no eventfd, and what the system says if there can be no further
    descriptor.
    """

    __slots__ = ("asserted", "gsi", "identity", "resample_fd", "trigger_fd")

    def __init__(self, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        doing = f"attaching eventfds to input {gsi}"
        trigger = identity(trigger_fd)
        if trigger is None or identity(resample_fd) is None:
            raise IrqchipError(doing, errno.EINVAL)
        self.gsi = gsi
        self.identity = trigger
        """Of the trigger eventfd, see `client._eventfd.identity`."""
        self.asserted = False
        """Whether the input is high on its behalf, for those who must remember that."""
        try:
            self.trigger_fd = os.dup(trigger_fd)
            try:
                self.resample_fd = os.dup(resample_fd)
            except OSError:
                os.close(self.trigger_fd)
                raise
        except OSError as error:
            raise IrqchipError(doing, error.errno or 0) from None

    def close(self) -> None:
        """Close our descriptors; once."""
        os.close(self.trigger_fd)
        os.close(self.resample_fd)
