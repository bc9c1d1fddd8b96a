"""Commands on the control queue of a network device (virtio 1.3, 5.1.6.5)."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

import trio

from client.dma import DmaBuffer
from client.errors import ClientError
from client.virtio._ring import Ring

SLOT_SIZE: Final = 4096
"""Bytes for one command: a MAC table of some 650 addresses."""

SLOTS: Final = 8
"""Commands under way at a time; a chain of three descriptors each."""

RING_SIZE: Final = 32


class Kind(NamedTuple):
    """The class and the number of a command."""

    cls: int
    number: int


class RxMode(IntEnum):
    """Commands of class 0: one byte, on or off."""

    PROMISCUOUS = 0
    ALL_MULTICAST = 1
    ALL_UNICAST = 2
    NO_MULTICAST = 3
    NO_UNICAST = 4
    NO_BROADCAST = 5


class Command:
    """The commands that this driver sends."""

    MAC_TABLE: Final = Kind(1, 0)
    MAC_ADDRESS: Final = Kind(1, 1)
    VLAN_ADD: Final = Kind(2, 0)
    VLAN_REMOVE: Final = Kind(2, 1)
    ANNOUNCED: Final = Kind(3, 0)
    QUEUE_PAIRS: Final = Kind(4, 0)
    GUEST_OFFLOADS: Final = Kind(5, 0)


class ControlError(ClientError):
    """The device refuses a command of the control queue."""


@dataclass(slots=True, eq=False)
class _Pending:
    kind: Kind
    slot: DmaBuffer
    ack_at: int
    done: trio.Event = field(default_factory=trio.Event)
    ack: int | None = None


class ControlQueue:
    """Sends commands and waits for their acknowledgement; several may be under way.

    `kick` notifies the device. Whoever hears of an interrupt calls `collect`. A command that is given up
    keeps its slot until the device gives it back.
    """

    def __init__(self, ring: Ring, memory: DmaBuffer, kick: Callable[[], None]) -> None:
        self._ring = ring
        self._kick = kick
        self._slots = [
            DmaBuffer(memory.iova + at, memory.view[at : at + SLOT_SIZE])
            for at in range(0, SLOTS * SLOT_SIZE, SLOT_SIZE)
        ]
        self._room = trio.lowlevel.ParkingLot()
        self._under_way: set[_Pending] = set()
        self._sent: Counter[Kind] = Counter()
        self._closed = False

    async def command(self, kind: Kind, data: bytes = b"") -> None:
        """Raises ControlError if the device refuses it, ClientError if it is too long or the queue is reset
        meanwhile.
        """
        if len(data) + 3 > SLOT_SIZE:
            raise ClientError(f"a control command of {len(data)} bytes")
        self._check()
        while not self._slots:
            await self._room.park()
            self._check()
        pending = self._send(kind, data)
        await pending.done.wait()
        if pending.ack is None:
            raise ClientError("the device failed or was reset during a control command")
        if pending.ack != 0:
            raise ControlError(f"the device refuses control command {kind.cls}.{kind.number}")

    def once(self, kind: Kind) -> Callable[[], None]:
        """A way to send a command whose answer nobody waits for. Nothing is sent if one of its kind is under
        way now or was sent by then, as many are under way as there is room for, or the queue has ended.

        So who reads in between what the device wants does not grant a wish twice: what was read beside a
        command may be older than that. Raises DeviceError as `collect` does.
        """
        self.collect()
        before = self._sent[kind]
        is_under_way = any(pending.kind == kind for pending in self._under_way)

        def send() -> None:
            if not self._closed and not is_under_way and self._sent[kind] == before and self._slots:
                self._send(kind)

        return send

    def _send(self, kind: Kind, data: bytes = b"") -> _Pending:
        slot = self._slots.pop()
        self._sent[kind] += 1
        ack_at = SLOT_SIZE - 1
        slot.view[0:2] = bytes(kind)
        slot.view[2 : 2 + len(data)] = data
        slot.view[ack_at] = 0xFF
        readable = [(slot.iova, 2)] + ([(slot.iova + 2, len(data))] if data else [])
        pending = _Pending(kind, slot, ack_at)
        self._under_way.add(pending)
        self._ring.add(readable, [(slot.iova + ack_at, 1)], pending)
        if self._ring.publish():
            self._kick()
        return pending

    def collect(self) -> None:
        """Take back what the device has done and ask for an interrupt for the rest."""
        while not self._closed:
            for pending, _ in self._ring.collect():
                assert isinstance(pending, _Pending)
                pending.ack = pending.slot.view[pending.ack_at]
                self._finish(pending)
            if not self._ring.enable_interrupts():
                return

    def _finish(self, pending: _Pending) -> None:
        self._under_way.discard(pending)
        pending.done.set()
        self._slots.append(pending.slot)
        self._room.unpark()

    def _check(self) -> None:
        if self._closed:
            raise ClientError("the device failed or was reset")

    def abandon(self) -> None:
        """The device failed: commands under way fail too. Their memory stays the device's until `close`."""
        self._closed = True
        for pending in self._under_way:
            pending.done.set()
        self._room.unpark_all()

    def close(self) -> None:
        """The device is reset and has nothing any more; commands under way fail."""
        self._closed = True
        for pending in list(self._under_way):
            self._finish(pending)
        self._room.unpark_all()
        self._ring.release()
        for slot in self._slots:
            slot.view.release()
        self._slots.clear()


def mac_table(unicast: Sequence[bytes], multicast: Sequence[bytes]) -> bytes:
    """The data of MAC_TABLE: two lists of addresses, each after its 32-bit length."""
    for address in (*unicast, *multicast):
        if len(address) != 6:
            raise ClientError(f"a MAC address of {len(address)} bytes")
    lists = (struct.pack("<I", len(addresses)) + b"".join(addresses) for addresses in (unicast, multicast))
    return b"".join(lists)
