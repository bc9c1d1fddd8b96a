"""Irqchips modelled in this process, to be used where there is no KVM and to look into."""

from client.irqchip.userspace.chip import Delivery as Delivery
from client.irqchip.userspace.chip import InputCounters as InputCounters
from client.irqchip.userspace.chip import UserspaceChip as UserspaceChip
from client.irqchip.userspace.ioapic import Ioapic as Ioapic
from client.irqchip.userspace.ioapic import IoapicState as IoapicState
from client.irqchip.userspace.ioapic import open_ioapic as open_ioapic
from client.irqchip.userspace.pic import Pic as Pic
from client.irqchip.userspace.pic import open_pic as open_pic
