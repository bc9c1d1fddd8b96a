"""What a machine's irqchip offers to its devices: inputs with a level, and eventfds in place of them.

It is KVM's interface (Documentation/virt/kvm/api.rst: KVM_IRQ_LINE, KVM_IRQFD), so that a real one can stand
behind it as well as a model.
"""

from __future__ import annotations

import errno as _errno
import os
from abc import ABC, abstractmethod

from client.errors import ClientError


class IrqchipError(ClientError):
    """An irqchip refuses; `errno` says why, as KVM does."""

    def __init__(self, doing: str, errno: int) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{doing}: {os.strerror(errno)} [{name}]")
        self.errno = errno


class Irqchip(ABC):
    """An interrupt controller with inputs 0 to `inputs` - 1, called `name`.

    `resample` says whether eventfds can stand for a level, which takes one that is signalled at the end of
    interrupt.
    """

    name: str
    inputs: int
    resample: bool = True

    def has_input(self, gsi: int) -> bool:
        """Whether a device can be on input `gsi`: some irqchips need one for themselves."""
        return 0 <= gsi < self.inputs

    @abstractmethod
    def activate(self) -> None:
        """The machine uses this irqchip from now on; raises IrqchipError if it cannot."""

    @abstractmethod
    def deactivate(self) -> None:
        """The machine uses another one from now on: no input of this one interrupts a CPU any more."""

    @abstractmethod
    def attach(self, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        """Raise input `gsi` whenever eventfd `trigger_fd` is signalled, which takes what it counted. Once a
        CPU has ended that interrupt the input is let go, and then eventfd `resample_fd` is signalled
        (KVM_IRQFD_FLAG_RESAMPLE).

        Both are borrowed, and duplicated. What `trigger_fd` counted before counts. Raises IrqchipError:
        EINVAL for an input or an eventfd that is none, EBUSY for a `trigger_fd` that is attached already.
        """

    @abstractmethod
    def detach(self, gsi: int, trigger_fd: int) -> None:
        """Undo `attach`; when this returns neither eventfd is touched any more, and the input is no longer
        raised on their behalf. Detaching what is not attached does nothing.
        """

    @abstractmethod
    def set_level(self, gsi: int, level: bool) -> None:
        """Drive input `gsi`, for all who do so without an eventfd; raises IrqchipError(EINVAL) for an input
        that is none.
        """
