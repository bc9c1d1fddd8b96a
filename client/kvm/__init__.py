"""A small machine on /dev/kvm: memory, an irqchip, a processor that runs a few hundred bytes of ours."""

from client.kvm.errors import GuestError as GuestError
from client.kvm.errors import KvmError as KvmError
from client.kvm.machine import RealModeMachine as RealModeMachine
from client.kvm.machine import Register as Register
from client.kvm.machine import open_machine as open_machine
from client.kvm.ports import PortDriver as PortDriver
from client.kvm.ports import open_port_driver as open_port_driver
from client.kvm.routing import IrqchipRoute as IrqchipRoute
from client.kvm.routing import MsiRoute as MsiRoute
from client.kvm.state import IoapicState as IoapicState
from client.kvm.state import PicState as PicState
from client.kvm.vcpu import Exits as Exits
from client.kvm.vcpu import Vcpu as Vcpu
from client.kvm.vm import Vm as Vm
