"""The host's side of vfio-user: drives anyone's server, and knows nothing of ours."""

from client.bars import Bar as Bar
from client.bars import BarMapping as BarMapping
from client.connecting import connect as connect
from client.connecting import over_socket as over_socket
from client.dma import DmaBuffer as DmaBuffer
from client.dma import DmaMemory as DmaMemory
from client.dma import dma_memory as dma_memory
from client.errors import BadReplyError as BadReplyError
from client.errors import ClientError as ClientError
from client.errors import ConnectError as ConnectError
from client.errors import DeviceError as DeviceError
from client.errors import Disconnected as Disconnected
from client.errors import ServerError as ServerError
from client.interrupts import Interrupt as Interrupt
from client.interrupts import IntxLine as IntxLine
from client.interrupts import intx as intx
from client.interrupts import msi as msi
from client.interrupts import msix as msix
from client.regions import IrqDetails as IrqDetails
from client.regions import RegionDetails as RegionDetails
from client.session import Session as Session
