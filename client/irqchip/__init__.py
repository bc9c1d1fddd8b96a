"""Irqchips, and PCI's interrupt lines through them: see `docs/interrupts.md`."""

from client.irqchip._slow import IntxCounters as IntxCounters
from client.irqchip.chip import Irqchip as Irqchip
from client.irqchip.chip import IrqchipError as IrqchipError
from client.irqchip.controller import InterruptController as InterruptController
from client.irqchip.intx import Intx as Intx
from client.irqchip.intx import open_intx as open_intx
from client.irqchip.notifier import Notifier as Notifier
from client.irqchip.routes import NOWHERE as NOWHERE
from client.irqchip.routes import IntxMode as IntxMode
from client.irqchip.routes import IntxRoute as IntxRoute
from client.irqchip.routes import root_line as root_line
