"""What checks know of the device behind the server: asked once, believed in no more than its form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from conformance._messages import split
from conformance._peer import Peer
from conformance.checks import NotApplicable, expect
from protocol import Command
from protocol.messages import DeviceInfo, IrqInfo, RegionAccess, RegionInfo
from protocol.vfio import DeviceFlags, IrqIndex, IrqInfoFlags, RegionIndex

ROOM: Final = 4096
"""`argsz` of a first question: room for a chain of some 250 sparse areas."""

INTERRUPT_LINE: Final = 0x3C
"""The scratch register that every PCI function has (PCI, "Interrupt Line"): software's own, no effect."""

COMMAND: Final = 0x04
"""The command register (PCI, "Device Control")."""

MEMORY_SPACE: Final = 1 << 1
"""Of the command register: whether the function answers in its BARs (PCI, "Memory Space Enable")."""

BUS_MASTER: Final = 1 << 2
"""Of the command register: whether the function may do DMA (PCI, "Bus Master Enable")."""

MOST_INDEXES: Final = 64
"""Regions or interrupt kinds that are asked for: a server that has more is not walked to its end."""


@dataclass(frozen=True, slots=True)
class Region:
    """A region with the capability chain and the descriptors that came."""

    info: RegionInfo
    chain: bytes
    fds: tuple[int, ...]

    @property
    def index(self) -> int:
        """Its number."""
        return self.info.index

    @property
    def length(self) -> int:
        """Its bytes."""
        return self.info.length


@dataclass(frozen=True, slots=True)
class Device:
    """All that was told."""

    info: DeviceInfo
    regions: tuple[Region, ...]
    irqs: tuple[IrqInfo, ...]

    @property
    def resettable(self) -> bool:
        """DEVICE_RESET was announced."""
        return DeviceFlags.RESET in self.info.flags


async def device_info(peer: Peer) -> DeviceInfo:
    """The device's flags and counts."""
    reply = await peer.granted(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size))
    body, _ = split(reply, DeviceInfo)
    assert isinstance(body, DeviceInfo)
    return body


async def region(peer: Peer, index: int) -> Region:
    """One region, asked for with more room if it says so."""
    reply = await peer.granted(Command.DEVICE_GET_REGION_INFO, RegionInfo(ROOM, index=index))
    body, chain = split(reply, RegionInfo)
    if body.argsz > ROOM:
        reply = await peer.granted(Command.DEVICE_GET_REGION_INFO, RegionInfo(body.argsz, index=index))
        body, chain = split(reply, RegionInfo)
    return Region(body, chain, reply.fds)


async def regions(peer: Peer) -> tuple[Region, ...]:
    """All regions, in the order of their indexes."""
    count = (await device_info(peer)).num_regions
    return tuple([await region(peer, index) for index in range(min(count, MOST_INDEXES))])


async def irqs(peer: Peer) -> tuple[IrqInfo, ...]:
    """All kinds of interrupts, in the order of their indexes."""
    found = []
    for index in range(min((await device_info(peer)).num_irqs, MOST_INDEXES)):
        reply = await peer.granted(Command.DEVICE_GET_IRQ_INFO, IrqInfo(IrqInfo.size, index=index))
        found.append(split(reply, IrqInfo)[0])
    return tuple(found)


async def survey(peer: Peer) -> Device:
    """Everything at once."""
    return Device(await device_info(peer), await regions(peer), await irqs(peer))


async def resettable(peer: Peer) -> None:
    """Go on only with a device that can be reset."""
    if DeviceFlags.RESET not in (await device_info(peer)).flags:
        raise NotApplicable("the device does not announce DEVICE_RESET")


async def vectors(peer: Peer, *, at_least: int = 1) -> IrqInfo:
    """An interrupt index to test with: the first of MSI-X, MSI and INTx that has so many interrupts and takes
    eventfds.
    """
    found = await irqs(peer)
    for index in (IrqIndex.MSIX, IrqIndex.MSI, IrqIndex.INTX):
        if index < len(found):
            irq = found[index]
            if irq.count >= at_least and IrqInfoFlags.EVENTFD in irq.flags:
                return irq
    raise NotApplicable(f"no kind of interrupt has {at_least} that take an eventfd")


async def read(peer: Peer, index: int, offset: int, count: int) -> bytes:
    """Bytes of a region, all that were asked for."""
    asked = RegionAccess(offset, index, count)
    reply = await peer.granted(Command.REGION_READ, asked)
    body, data = split(reply, RegionAccess)
    expect(body == asked and len(data) == count, f"{asked.pretty()} with its data", reply)
    return data


async def write(peer: Peer, index: int, offset: int, data: bytes) -> None:
    """Write bytes to a region."""
    asked = RegionAccess(offset, index, len(data))
    await peer.granted(Command.REGION_WRITE, asked.encode() + data)


async def config(peer: Peer) -> Region:
    """The configuration space."""
    if (await device_info(peer)).num_regions <= RegionIndex.CONFIG:
        raise NotApplicable("the device has no PCI configuration space")
    found = await region(peer, RegionIndex.CONFIG)
    if found.length <= INTERRUPT_LINE:
        raise NotApplicable("the device has no PCI configuration space")
    # Its flags are checked elsewhere: some servers let it be read and do not say so.
    if (await peer.ask(Command.REGION_READ, scratch_read())).refused:
        raise NotApplicable("PCI configuration space cannot be read")
    return found


async def decode_memory(peer: Peer) -> None:
    """Let the function answer in its BARs, as a driver would; whatever has no such register answers as it is.

    A server may refuse accesses to BARs before, and its mappings fault, as those of the kernel's vfio-pci.
    """
    if (await device_info(peer)).num_regions <= RegionIndex.CONFIG:
        return
    asked = RegionAccess(COMMAND, RegionIndex.CONFIG, 2)
    reply = await peer.ask(Command.REGION_READ, asked)
    if not reply.refused:
        command = int.from_bytes(reply.payload[RegionAccess.size :], "little") | MEMORY_SPACE
        await peer.ask(Command.REGION_WRITE, asked.encode() + command.to_bytes(2, "little"))


@asynccontextmanager
async def scratch(peer: Peer) -> AsyncIterator[bytes]:
    """The one register that checks write without harm; its value is put back at the end of a block that
    succeeds.
    """
    await config(peer)
    before = await read(peer, RegionIndex.CONFIG, INTERRUPT_LINE, 1)
    reply = await peer.ask(Command.REGION_WRITE, scratch_write(before))
    if reply.refused:
        raise NotApplicable(f"the interrupt line register cannot be written: {reply}")
    yield before
    await write(peer, RegionIndex.CONFIG, INTERRUPT_LINE, before)


def scratch_write(value: bytes) -> bytes:
    """The payload of a REGION_WRITE to the scratch register."""
    return RegionAccess(INTERRUPT_LINE, RegionIndex.CONFIG, len(value)).encode() + value


def scratch_read() -> RegionAccess:
    """The payload of a REGION_READ of the scratch register."""
    return RegionAccess(INTERRUPT_LINE, RegionIndex.CONFIG, 1)
