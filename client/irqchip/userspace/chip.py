"""What irqchips that are modelled here have in common: who drives their inputs, and the CPU's side of them.

An eventfd drives an input as KVM's irqfds with a resampler do (virt/kvm/eventfd.c): a count raises the input,
the end of interrupt lets it go for all eventfds of that input, and then signals all their resample eventfds.
"""

from __future__ import annotations

import errno
import select
from abc import abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, NoReturn

import trio

from client._eventfd import identity, signal, take
from client._nursery import background
from client.irqchip._attachment import Attachment
from client.irqchip.chip import Irqchip, IrqchipError


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a CPU got for its acknowledgement: the input that interrupts, and the vector it was given."""

    gsi: int
    vector: int


@dataclass(slots=True)
class InputCounters:
    """What happened at one input.

    For one that is driven by eventfds alone, `raised` is the sum of `acknowledged`, `withdrawn`, `resampled`,
    and one if an interrupt is pending.
    """

    triggered: int = 0
    """What its eventfds had counted when they were taken from."""
    merged: int = 0
    """How many of those came before the last one was done with: they were taken together with it, or while it
    still held the input up.
    """
    raised: int = 0
    """The input rose, whoever drove it, and no interrupt of it was pending."""
    acknowledged: int = 0
    """A CPU took the interrupt."""
    withdrawn: int = 0
    """The input fell before, because an eventfd was detached or a level fell: no CPU will hear of it."""
    resampled: int = 0
    """The input fell before, because the chip let it go: at the end of an earlier interrupt, or when it was
    unmasked. The resample eventfd was signalled, and brings it back if need be.
    """
    ended: int = 0
    """The CPU ended the interrupt."""


class UserspaceChip(Irqchip):
    """An irqchip in this process, not active at first. Its eventfds are heard in the block of `watched`.

    While another one is active it keeps its state, asks no CPU, and leaves what its eventfds count to them.
    """

    def __init__(self, name: str, inputs: int) -> None:
        self.name = name
        self.inputs = inputs
        self.counters: Final = tuple(InputCounters() for _ in range(inputs))
        self.spurious = 0
        """Acknowledgements that no input had asked for."""
        self._active = False
        self._activated = trio.Event()
        self._wanted = False  # the chip's output to the CPU, were it active
        self._cpus = trio.lowlevel.ParkingLot()
        self._epoll: select.epoll | None = None  # while it is watched
        self._attached: dict[int | None, Attachment] = {}  # by the identity of the trigger eventfd
        self._by_fd: dict[int, Attachment] = {}
        self._at: list[list[Attachment]] = [[] for _ in range(inputs)]
        self._held = 0  # inputs high by set_level
        self._high = 0
        self._unheard = 0  # inputs with a pending interrupt: neither acknowledged nor taken back

    # ---- the machine's side

    @property
    def active(self) -> bool:
        """Whether the machine uses this irqchip."""
        return self._active

    def activate(self) -> None:
        """The machine uses this irqchip from now on; what its eventfds counted meanwhile counts."""
        self._active = True
        self._activated.set()
        self._wake()

    def deactivate(self) -> None:
        """The machine uses another one from now on. What waits for a CPU waits until this one is used again,
        or until its eventfd is detached.
        """
        if self._active:
            self._active = False
            self._activated = trio.Event()

    def attach(self, gsi: int, trigger_fd: int, resample_fd: int) -> None:
        """See `Irqchip.attach`. Several eventfds may share an input. Raises IrqchipError(ENODEV) outside of
        the block of `watched`, and what the system said if there are no more descriptors.
        """
        self._check(gsi)
        doing = f"attaching eventfds to input {gsi} of {self.name}"
        if self._epoll is None:
            raise IrqchipError(doing, errno.ENODEV)
        if identity(trigger_fd) in self._attached:
            raise IrqchipError(doing, errno.EBUSY)
        attachment = Attachment(gsi, trigger_fd, resample_fd)
        try:
            self._epoll.register(attachment.trigger_fd, select.EPOLLIN)
        except OSError as error:
            attachment.close()
            raise IrqchipError(doing, error.errno or 0) from None
        self._by_fd[attachment.trigger_fd] = attachment
        self._attached[attachment.identity] = attachment
        self._at[gsi].append(attachment)

    def detach(self, gsi: int, trigger_fd: int) -> None:
        """See `Irqchip.detach`. An interrupt that no CPU has acknowledged is withdrawn if the chip can take
        it back; one in service stays so until it is ended, which then signals nobody.
        """
        attachment = self._attached.get(identity(trigger_fd))
        if attachment is not None and attachment.gsi == gsi:
            del self._attached[attachment.identity]
            self._part(attachment)

    def set_level(self, gsi: int, level: bool) -> None:
        """See `Irqchip.set_level`."""
        self._check(gsi)
        if level:
            self._held |= 1 << gsi
        else:
            self._held &= ~(1 << gsi)
        self.counters[gsi].withdrawn += self._drive(gsi)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Attached eventfds raise their inputs for as long as the block; everything is detached then."""
        with select.epoll() as self._epoll:
            try:
                async with background() as nursery:
                    nursery.start_soon(self._watch, self._epoll)
                    yield
            finally:
                for attachment in self._attached.values():
                    self._part(attachment)
                self._attached.clear()
                self._epoll = None

    # ---- the CPU's side

    @property
    def asks(self) -> bool:
        """Whether the chip interrupts the CPU."""
        return self._wanted and self._active

    async def wait(self) -> None:
        """Wait until the chip asks for the CPU."""
        await trio.lowlevel.checkpoint()
        while not self.asks:
            await self._cpus.park()

    def acknowledge(self) -> Delivery | None:
        """Take the interrupt of the highest priority, which is in service until `end`. None if there was
        none, or the chip that asked has nothing any more: a spurious interrupt, which needs no end.
        """
        if not self._active:
            return None
        delivery = self._acknowledge()
        if delivery is None:
            self.spurious += 1
        return delivery

    @abstractmethod
    def end(self, delivery: Delivery) -> None:
        """End an interrupt that was acknowledged, also when the chip is no longer active. One that is not in
        service (any more) changes nothing.
        """

    @abstractmethod
    def _acknowledge(self) -> Delivery | None:
        """The chip's part of `acknowledge`."""

    # ---- between this class and the model of the chip

    @abstractmethod
    def _set_input(self, gsi: int, level: bool) -> None:
        """An input is driven to a level; it may have had that before."""

    @abstractmethod
    def _requests(self, gsi: int) -> bool:
        """Whether an input that is low still waits for a CPU: the chip cannot take it back."""

    def _check(self, gsi: int) -> None:
        if not self.has_input(gsi):
            raise IrqchipError(f"input {gsi} of {self.name}", errno.EINVAL)

    def _want(self, wanted: bool) -> None:
        """The chip's output to the CPU."""
        self._wanted = wanted
        if wanted:
            self._wake()

    def _accepted(self, gsi: int) -> None:
        """A CPU acknowledged the interrupt of an input."""
        self.counters[gsi].acknowledged += 1
        self._unheard &= ~(1 << gsi)

    def _release(self, gsi: int) -> None:
        """Let an input go, and have its devices raise it again if they must (KVM's ack notifier)."""
        attachments = self._at[gsi]
        if not attachments:
            return
        for attachment in attachments:
            attachment.asserted = False
        self.counters[gsi].resampled += self._drive(gsi)
        for attachment in attachments:
            signal(attachment.resample_fd)

    def _raised_by_eventfds_alone(self, gsi: int) -> bool:
        """Whether an input that is high is so because of eventfds and nobody else."""
        return bool(self._at[gsi]) and not self._held & 1 << gsi

    def _wake(self) -> None:
        if self._cpus and self.asks:
            self._cpus.unpark_all()

    def _drive(self, gsi: int) -> bool:
        """Give an input the level that its drivers make; whether an interrupt was taken back by that."""
        bit = 1 << gsi
        high = bool(self._held & bit) or any(attachment.asserted for attachment in self._at[gsi])
        if high and not self._high & bit:
            self._high |= bit
            if not self._unheard & bit:
                self._unheard |= bit
                self.counters[gsi].raised += 1
        elif not high:
            self._high &= ~bit
        self._set_input(gsi, high)
        if high or not self._unheard & bit or self._requests(gsi):
            return False
        self._unheard &= ~bit
        return True

    async def _watch(self, epoll: select.epoll) -> NoReturn:
        while True:
            if not self._active:
                await self._activated.wait()
            await trio.lowlevel.wait_readable(epoll)
            if self._active:
                self._take(epoll)

    def _take(self, epoll: select.epoll) -> None:
        for fd, _ in epoll.poll(0):
            attachment = self._by_fd[fd]
            count = take(fd)
            if not count:
                continue
            counters = self.counters[attachment.gsi]
            counters.triggered += count
            counters.merged += count - 1 + attachment.asserted
            attachment.asserted = True
            self._drive(attachment.gsi)

    def _part(self, attachment: Attachment) -> None:
        assert self._epoll is not None
        self._epoll.unregister(attachment.trigger_fd)
        del self._by_fd[attachment.trigger_fd]
        self._at[attachment.gsi].remove(attachment)
        attachment.close()
        if attachment.asserted:
            self.counters[attachment.gsi].withdrawn += self._drive(attachment.gsi)
