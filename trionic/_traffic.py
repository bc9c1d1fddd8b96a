"""Numbered frames that a card sends back by its own loopback, and what became of each: none may be lost,
doubled or overtaken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import trio

import client
from client.virtio import NetDriver

# What is under way at the end has as long to come back; only a lost frame is waited for so long.
GRACE_S: Final = 2.0

# Frames under way at a time: fewer than a receive queue holds, so that the card never has to drop one.
UNDER_WAY: Final = 64

_FRAME_SIZE: Final = 256
_NUMBER_AT: Final = 14
_NUMBER_SIZE: Final = 8
_BROADCAST: Final = b"\xff" * 6
_SOMEBODY: Final = b"\x02\0\0\0\0\1"  # locally administered
_ETHERTYPE: Final = b"\x88\xb5"  # IEEE 802 local experimental Ethertype 1


@dataclass(slots=True)
class Frames:
    """What became of the frames."""

    sent: int = 0
    received: int = 0
    doubled: int = 0
    """Frames that came back once more than they were sent."""
    overtaken: int = 0
    """Frames that came back before one that was sent earlier."""

    @property
    def lost(self) -> int:
        """Frames that did not come back."""
        return self.sent - (self.received - self.doubled)

    @property
    def sound(self) -> bool:
        """Whether every frame came back once, in order."""
        return not (self.lost or self.doubled or self.overtaken)


class Traffic:
    """Numbered frames from the driver to itself, as many as the card takes."""

    def __init__(self, nic: NetDriver, frames: Frames) -> None:
        self._nic = nic
        self._frames = frames
        address = nic.mac or _BROADCAST  # for a card that has no address of its own
        self._head = address + (nic.mac or _SOMEBODY) + _ETHERTYPE
        self._expected = frames.sent
        self._waiting: set[int] = set()
        self._room = trio.Event()
        self._quiet = trio.Event()
        self._more = trio.Event()
        self._wanted = 0
        self._ending = False

    async def send(self) -> None:
        """Send until `end`; a task of its own."""
        while not self._ending:
            if len(self._waiting) >= UNDER_WAY:
                self._room = trio.Event()
                await self._room.wait()
                continue
            number = self._frames.sent
            self._frames.sent += 1
            self._waiting.add(number)
            frame = self._head + number.to_bytes(_NUMBER_SIZE, "big")
            await self._nic.send(frame.ljust(_FRAME_SIZE, b"\0"))

    async def receive(self) -> None:
        """Take what comes back, until `end` and all is back; a task of its own."""
        while True:
            for frame in self._nic.receive_burst():
                self._take(int.from_bytes(frame[_NUMBER_AT : _NUMBER_AT + _NUMBER_SIZE], "big"))
            if len(self._waiting) < UNDER_WAY:
                self._room.set()
            if self._ending and not self._waiting:
                self._quiet.set()
                return
            await self._nic.wait_receivable()

    def _take(self, number: int) -> None:
        frames = self._frames
        frames.received += 1
        if frames.received >= self._wanted:
            self._more.set()
        if number not in self._waiting:
            frames.doubled += 1
            return
        self._waiting.remove(number)
        if number != self._expected:
            frames.overtaken += 1
        self._expected = number + 1

    async def wait_begun(self) -> None:
        """Until the first frame came back; ClientError if none does."""
        if not await self.wait_more(1):
            raise client.ClientError(
                "no frame comes back: only a card whose port is a loopback can be counted under traffic"
            )

    async def wait_more(self, count: int) -> bool:
        """Until so many further frames came back; whether they did within `GRACE_S`."""
        self._more, self._wanted = trio.Event(), self._frames.received + count
        with trio.move_on_after(GRACE_S):
            await self._more.wait()
        return self._more.is_set()

    async def end(self) -> None:
        """Send no more, and wait for what is under way."""
        self._ending = True
        self._room.set()
        with trio.move_on_after(GRACE_S):
            await self._quiet.wait()
