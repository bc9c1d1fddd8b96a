"""The fast path of INTx: two eventfds between server and irqchip, and nobody of ours in between."""

from __future__ import annotations

import os
from typing import Final

from client._eventfd import make_eventfd
from client.irqchip.chip import Irqchip


class Bypass:
    """`trigger_fd` raises input `gsi` of `chip`, which signals `resample_fd` at the end of interrupt.

    Raises IrqchipError if the chip refuses, and OSError if there can be no further eventfd.
    """

    def __init__(self, chip: Irqchip, gsi: int, trigger_fd: int) -> None:
        self._chip: Final = chip
        self._gsi: Final = gsi
        self._trigger_fd: Final = trigger_fd
        self.resample_fd: Final = make_eventfd()
        try:
            chip.attach(gsi, trigger_fd, self.resample_fd)
        except BaseException:
            os.close(self.resample_fd)
            raise

    def close(self) -> None:
        """Detach, from the chip it was attached to, whichever is active by now. The server's copy of the
        resample eventfd is signalled by nobody any more.
        """
        try:
            self._chip.detach(self._gsi, self._trigger_fd)
        finally:
            os.close(self.resample_fd)
