"""The PC's pair of 8259A interrupt controllers: sixteen inputs, less the one that joins them.

    async with open_pic() as chip:
        controller = InterruptController(chip, routes)

The guest's side is `read` and `write`, with the port numbers of a PC, and `intack`.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum
from typing import Final

from client.irqchip.chip import IrqchipError
from client.irqchip.registers import PIC_CASCADE, PIC_HALF, PIC_INPUTS, PicState
from client.irqchip.userspace._i8259 import I8259, NO_INTERRUPT
from client.irqchip.userspace.chip import Delivery, UserspaceChip


class Ports(IntEnum):
    """The first of two I/O ports each."""

    MASTER = 0x20
    """For commands; the next one is for data."""
    SLAVE = 0xA0
    ELCR = 0x4D0
    """Chooses between level and edge for the master's inputs; the next one for the slave's."""


LEVEL_CAPABLE: Final = 0xDEF8
"""Inputs that ELCR can make level-triggered, as bits; the others belong to timer, keyboard, cascade, clock
and coprocessor (82371FB data sheet, ELCR).
"""
VECTORS: Final = 0x20
"""Where `program` puts the sixteen vectors: the first that are free on x86."""

_POLLED: Final = 0x80  # the answer to a poll: there was an interrupt, of the input in the low bits
_END_OF: Final = 0x60  # OCW2: the end of the interrupt that the low bits name


class Pic(UserspaceChip):
    """The pair as it is after power-on; see `program`."""

    def __init__(self, name: str = "pic") -> None:
        super().__init__(name, PIC_INPUTS)
        self._master = I8259(True, LEVEL_CAPABLE & 0xFF, self._master_cleared)
        self._slave = I8259(False, LEVEL_CAPABLE >> PIC_HALF, self._slave_cleared)

    def has_input(self, gsi: int) -> bool:
        """Whether a device can be on input `gsi`: not on that of the cascade."""
        return gsi != PIC_CASCADE and super().has_input(gsi)

    def state(self) -> PicState:
        """The registers as they are now."""
        return PicState(self._master.state(), self._slave.state())

    def program(self, vectors: int = VECTORS, level: int = LEVEL_CAPABLE) -> None:
        """Do what firmware does: sixteen vectors from `vectors` on, the inputs in `level` (bits) triggered by
        level, none masked, each interrupt ended by a command.
        """
        for port, icw2, icw3 in (
            (Ports.MASTER, vectors, 1 << PIC_CASCADE),
            (Ports.SLAVE, vectors + PIC_HALF, PIC_CASCADE),
        ):
            self.write(port, 0x11)
            for word in (icw2, icw3, 0x01):
                self.write(port + 1, word)
        self.write(Ports.ELCR, level & 0xFF)
        self.write(Ports.ELCR + 1, level >> PIC_HALF)
        for port in (Ports.MASTER, Ports.SLAVE):
            self.write(port + 1, 0)

    def write(self, port: int, value: int) -> None:
        """A byte from the CPU to a port; raises IrqchipError(ENXIO) for a port that is none of these six."""
        half, last = self._half(port)
        if last is None:
            half.write_elcr(value)
        elif half.write(last, value):
            self._update()

    def read(self, port: int) -> int:
        """A byte for the CPU from a port, which after a poll command acknowledges and ends an interrupt;
        raises IrqchipError(ENXIO) for a port that is none of these six.
        """
        half, last = self._half(port)
        if last is None:
            return half.elcr
        return self._poll(half) if half.poll else half.read(last)

    def intack(self) -> int:
        """The CPU's INTA cycle, which gives it a vector whether there is an interrupt or not.

        As with the real pair, a spurious one of the slave leaves input 2 of the master in service.
        """
        gsi, vector = self._intack()
        if gsi is None:
            self.spurious += 1
        return vector

    def end(self, delivery: Delivery) -> None:
        """See `UserspaceChip.end`. The commands name the inputs, so that they suit every mode; the master's
        is for when the slave has nothing in service any more.
        """
        gsi = delivery.gsi
        if gsi < PIC_HALF:
            if self._master.isr & 1 << gsi:
                self.write(Ports.MASTER, _END_OF | gsi)
            return
        if self._slave.isr & 1 << gsi - PIC_HALF:
            self.write(Ports.SLAVE, _END_OF | gsi - PIC_HALF)
        self._end_cascade()

    def _acknowledge(self) -> Delivery | None:
        gsi, vector = self._intack()
        if gsi is not None:
            return Delivery(gsi, vector)
        self._end_cascade()
        return None

    def _end_cascade(self) -> None:
        """End the master's part of the slave's interrupts, once the slave serves none."""
        if self._master.isr & 1 << PIC_CASCADE and not self._slave.isr:
            self.write(Ports.MASTER, _END_OF | PIC_CASCADE)

    def _intack(self) -> tuple[int | None, int]:
        """The input, None if it is spurious, and the vector."""
        gsi: int | None = self._master.wanted()
        if gsi is None:
            vector = self._master.irq_base + NO_INTERRUPT
        elif gsi != PIC_CASCADE:
            vector = self._master.irq_base + gsi
            self._accepted(gsi)
            self._master.acknowledge(gsi)
        else:
            self._master.acknowledge(PIC_CASCADE)
            irq = self._slave.wanted()
            if irq is None:
                gsi = None
                vector = self._slave.irq_base + NO_INTERRUPT
            else:
                gsi = irq + PIC_HALF
                vector = self._slave.irq_base + irq
                self._accepted(gsi)
                self._slave.acknowledge(irq)
        self._update()
        return gsi, vector

    def _half(self, port: int) -> tuple[I8259, int | None]:
        """Whose port it is, and its last bit; None for one of ELCR's."""
        match port & ~1:
            case Ports.MASTER:
                return self._master, port & 1
            case Ports.SLAVE:
                return self._slave, port & 1
            case Ports.ELCR:
                return self._slave if port & 1 else self._master, None
        raise IrqchipError(f"port {port:#x} of {self.name}", errno.ENXIO)

    def _poll(self, half: I8259) -> int:
        irq = half.wanted()
        cascade = half is self._master and irq == PIC_CASCADE
        if irq is not None and not cascade:
            self._accepted(irq if half is self._master else irq + PIC_HALF)
        if irq is not None and half is self._slave:
            self._master.isr &= ~(1 << PIC_CASCADE)
            self._master.irr &= ~(1 << PIC_CASCADE)
        half.poll_read()
        if not cascade:  # the slave, which is polled next, does not ask anew
            self._update()
        return NO_INTERRUPT if irq is None else _POLLED | irq

    def _set_input(self, gsi: int, level: bool) -> None:
        if gsi < PIC_HALF:
            self._master.set_input(gsi, level)
        else:
            self._slave.set_input(gsi - PIC_HALF, level)
        self._update()

    def _requests(self, gsi: int) -> bool:
        irr = self._master.irr | self._slave.irr << PIC_HALF
        return bool(irr & 1 << gsi)

    def _master_cleared(self, irq: int, served: bool) -> None:
        if irq != PIC_CASCADE:
            self._cleared(irq, served)

    def _slave_cleared(self, irq: int, served: bool) -> None:
        self._cleared(irq + PIC_HALF, served)

    def _cleared(self, gsi: int, served: bool) -> None:
        if served:
            self.counters[gsi].ended += 1
        self._release(gsi)

    def _update(self) -> None:
        """Follow up what may have changed the outputs: the slave's is an edge for the master."""
        if self._slave.wanted() is not None:
            self._master.set_input(PIC_CASCADE, True)
            self._master.set_input(PIC_CASCADE, False)
        self._want(self._master.wanted() is not None)


@asynccontextmanager
async def open_pic(name: str = "pic", *, programmed: bool = True) -> AsyncIterator[Pic]:
    """A pair of 8259A, not active at first, as firmware leaves it (`Pic.program`) or as after power-on."""
    chip = Pic(name)
    if programmed:
        chip.program()
    async with chip.watched():
        yield chip
