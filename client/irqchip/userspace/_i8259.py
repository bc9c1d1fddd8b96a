"""One Intel 8259A programmable interrupt controller, as KVM's is (arch/x86/kvm/i8259.c).

Where KVM's does otherwise than the data sheet (Intel 231468), this does as KVM: ELCR chooses between level
and edge, ICW1 cannot; special mask mode is kept, but has no effect; a poll ends the interrupt that it tells;
an end of interrupt that names an input tells its devices, in service or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Final

from client.irqchip.registers import PIC_CASCADE, PIC_HALF, Pic8259State

NO_INTERRUPT: Final = 7
"""The input whose vector a spurious interrupt has; what a poll says when there is none."""

_ICW1: Final = 0x10
_ICW1_ICW4: Final = 0x01
_OCW3: Final = 0x08
_OCW3_READ: Final = 0x02
_OCW3_POLL: Final = 0x04
_OCW3_SET_MASK: Final = 0x40
_ICW4_AUTO_EOI: Final = 0x02
_ICW4_NESTED: Final = 0x10

_REGISTERS: Final = tuple(field.name for field in fields(Pic8259State))


class I8259:
    """The registers, one attribute each. `cleared(irq, served)` is told when an interrupt is ended, by a CPU
    or by being acknowledged; its bit of ISR is clear by then, and was not if it `served`.

    What may change the output is for the caller to follow up: see `write`.
    """

    __slots__ = ("_cleared", "_master", *_REGISTERS)

    last_irr: int
    irr: int
    imr: int
    isr: int
    priority_add: int
    irq_base: int
    read_reg_select: int
    poll: int
    special_mask: int
    init_state: int
    auto_eoi: int
    rotate_on_auto_eoi: int
    special_fully_nested_mode: int
    init4: int
    elcr: int
    elcr_mask: int

    def __init__(self, master: bool, elcr_mask: int, cleared: Callable[[int, bool], None]) -> None:
        self._master = master
        self._cleared = cleared
        for field in fields(Pic8259State):
            setattr(self, field.name, field.default)
        self.elcr_mask = elcr_mask

    def state(self) -> Pic8259State:
        """A copy of the registers."""
        return Pic8259State(*(getattr(self, name) for name in _REGISTERS))

    def set_input(self, irq: int, level: bool) -> None:
        """An input has this level."""
        bit = 1 << irq
        if level:
            if self.elcr & bit or not self.last_irr & bit:
                self.irr |= bit
            self.last_irr |= bit
        else:
            if self.elcr & bit:
                self.irr &= ~bit
            self.last_irr &= ~bit

    def wanted(self) -> int | None:
        """The input to interrupt for: not masked, and of higher priority than all in service."""
        requests = self.irr & ~self.imr
        if not requests:
            return None
        in_service = self.isr
        if self._master and self.special_fully_nested_mode:
            in_service &= ~(1 << PIC_CASCADE)  # the slave may interrupt itself
        priority = self._priority(requests)
        return (priority + self.priority_add) & 7 if priority < self._priority(in_service) else None

    def acknowledge(self, irq: int) -> None:
        """The INTA cycle for an input."""
        bit = 1 << irq
        self.isr |= bit
        if not self.elcr & bit:
            self.irr &= ~bit
        if self.auto_eoi:
            if self.rotate_on_auto_eoi:
                self.priority_add = (irq + 1) & 7
            self._clear(irq)

    def write(self, address: int, value: int) -> bool:
        """A write to the command (0) or the data port (1); whether the output is to be computed anew."""
        if address:
            return self._write_data(value)
        if value & _ICW1:
            self._initialize(value)
            return False
        if value & _OCW3:
            if value & _OCW3_POLL:
                self.poll = 1
            if value & _OCW3_READ:
                self.read_reg_select = value & 1
            if value & _OCW3_SET_MASK:
                self.special_mask = value >> 5 & 1
            return False
        return self._write_ocw2(value >> 5, value & 7)

    def read(self, address: int) -> int:
        """A read of the command (0) or the data port (1), when `poll` is not set."""
        if address:
            return self.imr
        return self.isr if self.read_reg_select else self.irr

    def poll_read(self) -> int | None:
        """A read when `poll` was set: the input that was waiting, which is acknowledged and ended."""
        self.poll = 0
        irq = self.wanted()
        if irq is not None:
            self.isr |= 1 << irq
            self.irr &= ~(1 << irq)
            self._clear(irq)
        return irq

    def write_elcr(self, value: int) -> None:
        """The edge/level control register; inputs that must be edge-triggered stay so."""
        self.elcr = value & self.elcr_mask

    def _initialize(self, value: int) -> None:
        edges = self.irr & ~self.elcr
        self.init4 = value & _ICW1_ICW4
        self.last_irr = 0
        self.irr &= self.elcr
        self.imr = 0
        self.priority_add = 0
        self.special_mask = 0
        self.read_reg_select = 0
        if not self.init4:
            self.special_fully_nested_mode = 0
            self.auto_eoi = 0
        self.init_state = 1
        for irq in range(PIC_HALF):
            if edges & 1 << irq:
                self._clear(irq)

    def _write_data(self, value: int) -> bool:
        match self.init_state:
            case 0:
                self.imr = value
                return True
            case 1:
                self.irq_base = value & 0xF8
                self.init_state = 2
            case 2:  # who is slave of whom is wired
                self.init_state = 3 if self.init4 else 0
            case _:
                self.special_fully_nested_mode = int(bool(value & _ICW4_NESTED))
                self.auto_eoi = int(bool(value & _ICW4_AUTO_EOI))
                self.init_state = 0
        return False

    def _write_ocw2(self, command: int, irq: int) -> bool:
        """Data sheet, "Operation command words", OCW2: R, SL and EOI are bits 2 to 0 of `command`."""
        match command:
            case 0 | 4:
                self.rotate_on_auto_eoi = command >> 2
                return False
            case 1 | 5:
                priority = self._priority(self.isr)
                if priority == PIC_HALF:
                    return False
                irq = (priority + self.priority_add) & 7
                if command == 5:
                    self.priority_add = (irq + 1) & 7
                self._clear(irq)
            case 3:
                self._clear(irq)
            case 6:
                self.priority_add = (irq + 1) & 7
            case 7:
                self.priority_add = (irq + 1) & 7
                self._clear(irq)
            case _:
                return False
        return True

    def _priority(self, inputs: int) -> int:
        """Of these inputs the highest priority, 0 to 7; 8 if there is none."""
        if not inputs:
            return PIC_HALF
        turned = (inputs >> self.priority_add | inputs << (PIC_HALF - self.priority_add)) & 0xFF
        return (turned & -turned).bit_length() - 1

    def _clear(self, irq: int) -> None:
        bit = 1 << irq
        served = bool(self.isr & bit)
        self.isr &= ~bit
        self._cleared(irq, served)
