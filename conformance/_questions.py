"""What the watching server asks of a client, and how the answers are held against the memory behind them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import trio

from conformance._memory import PAGE
from conformance._messages import Message, message
from conformance._peer import Wire
from conformance._rules import ClientWindow, Situation
from protocol import Command
from protocol.messages import DmaAccess
from protocol.vfio import DmaMapFlags

UNKNOWN: Final = 0x7777
"""A command that nobody has."""

SAMPLE: Final = 64
"""Bytes of a window that are read and written."""

PLACES: Final = 64
"""In each window: some hit what a guest's kernel left there, wherever it was put."""

SAMPLED_WINDOWS: Final = 16
"""Windows that are looked into: a client with a virtual IOMMU maps thousands."""

NOWHERE: Final = tuple(page << 12 for page in (1 << 51, 3 << 49, 5 << 48, 1))
"""Addresses where hardly a client has memory."""

Answered = Callable[[Message], None]


@dataclass(slots=True)
class _Question:
    over: str
    then: Answered
    scope: trio.CancelScope


class Questions:
    """The server's side of a conversation that the client has to keep up; owned by the watching server.

    Asks over the twin socket if there is one.
    """

    def __init__(
        self, situation: Situation, wire: Wire, over: str, patience: float, *, destructive: bool
    ) -> None:
        self._situation = situation
        self._wire = wire
        self.over = over
        """The socket that questions go by, "main" or "twin"."""
        self._patience = patience
        self._destructive = destructive
        self._waiting: dict[tuple[int, int], _Question] = {}
        self._queue: list[tuple[Command | int, bytes, Answered]] = []
        self._next_id = 0x9000
        self._sampled = 0
        self._later: list[ClientWindow] = []
        self._bus_master = False
        self._probed_nowhere = False

    async def send(self, nursery: trio.Nursery) -> None:
        """Put on the wire what was decided to be asked."""
        while self._queue:
            command, payload, then = self._queue.pop(0)
            self._next_id = 0x9000 | (self._next_id + 1) & 0xFFF
            question = _Question(self.over, then, trio.CancelScope())
            self._waiting[self._next_id, command] = question
            nursery.start_soon(self._expire, self._next_id, command)
            await self._wire.send(message(command, payload, message_id=self._next_id))

    async def _expire(self, number: int, command: int) -> None:
        question = self._waiting[number, command]
        with question.scope:
            await trio.sleep(self._patience)
            del self._waiting[number, command]
            what = f"an answer to command {command:#x} within {self._patience:g} s"
            self._situation.judge("client-asked.answered", False, what, "none")

    def answered(self, reply: Message, over: str) -> None:
        """A reply came; it is held against its question."""
        judge = self._situation.judge
        question = self._waiting.pop((reply.message_id, reply.command), None)
        told = f"{reply} with id {reply.message_id:#x}"
        if not judge("client-header.replies", question is not None, "a reply to a question", told):
            return
        assert question is not None
        question.scope.cancel()
        judge("client-asked.answered", True, "", "")
        if question.over == "twin":
            judge("client-dma.twin", over == "twin", "an answer over the twin socket", f"one over {over}")
        if reply.refused:
            judge("client-asked.header-only", not reply.payload, "a header alone", told)
        question.then(reply)

    # what to ask

    def unknown(self) -> None:
        """A command that does not exist."""

        def then(reply: Message) -> None:
            self._situation.judge("client-asked.unknown", reply.refused, "an error reply", reply)

        self._queue.append((UNKNOWN, b"", then))

    def window(self, window: ClientWindow) -> None:
        """A window was mapped: it is looked into, as soon as the device may do DMA."""
        self._later.append(window)
        if self._bus_master:
            self._look()

    def bus_master(self, enabled: bool) -> None:
        """Bus mastering was switched on or off: before that, a PCI device does no DMA."""
        self._bus_master = enabled
        if enabled:
            self._look()

    def _look(self) -> None:
        if not self._probed_nowhere:
            self._nowhere()
        windows, self._later = self._later, []
        for window in windows:
            if self._there(window):
                self._sample(window)

    def _there(self, window: ClientWindow) -> bool:
        """It was not taken back meanwhile."""
        return self._situation.windows.get(window.address) is window

    def _sample(self, window: ClientWindow) -> None:
        """Read some places, and write the first if that is allowed."""
        if self._sampled == SAMPLED_WINDOWS or DmaMapFlags.READ not in window.flags:
            return
        self._sampled += 1
        writable = self._destructive and DmaMapFlags.WRITE in window.flags
        for number, place in enumerate(self._places(window)):
            self._ask_for(place, window, write=writable and number == 0)

    def _places(self, window: ClientWindow) -> list[ClientWindow]:
        """Places all over a window, with something in them where that can be seen: zeros look alike wherever
        they lie.
        """
        step = max(PAGE, window.length // PLACES & -PAGE)
        places = [
            replace(window, address=window.address + at, offset=window.offset + at, length=SAMPLE)
            for at in range(0, window.length - SAMPLE + 1, step)
        ]
        if window.fd < 0:
            return places
        return [each for each in places if any(self._behind(each, 4) or b"")] or places[:1]

    def _ask_for(
        self, place: ClientWindow, window: ClientWindow, *, write: bool, again: bool = False
    ) -> None:
        """A refusal is asked for a second time: the window may be on its way out."""
        before = self._behind(place, SAMPLE)

        def then(reply: Message) -> None:
            if not self._there(window):
                return
            if reply.refused and not again:
                self._ask_for(place, window, write=write, again=True)
                return
            data = self._read(place, SAMPLE, reply)
            if data is None or before is None or before != self._behind(place, SAMPLE):
                return
            good = data == before
            self._situation.judge("client-dma.read-data", good, before.hex(), data.hex())
            if write:
                self._write(place, bytes(byte ^ 0xFF for byte in before), before)

        self._queue.append((Command.DMA_READ, DmaAccess(place.address, SAMPLE).encode(), then))

    def _read(self, window: ClientWindow, count: int, reply: Message) -> bytes | None:
        asked = DmaAccess(window.address, count)
        wanted = f"{asked.pretty()} and {count} bytes"
        name = "client-dma.read" if window.fd >= 0 else "client-dma.without-descriptor"
        good = reply.payload[: asked.size] == asked.encode() and len(reply.payload) == asked.size + count
        if not self._situation.judge(name, good and not reply.refused, wanted, _told(reply)):
            return None
        return reply.payload[asked.size :]

    def _write(self, window: ClientWindow, data: bytes, original: bytes | None) -> None:
        asked = DmaAccess(window.address, len(data))

        def then(reply: Message) -> None:
            address = asked.address.to_bytes(8, sys.byteorder)
            count = asked.count.to_bytes(8, sys.byteorder)
            # The text gives the count four bytes here, and eight everywhere else.
            good = reply.payload in (address + count, address + count[:4])
            if not self._situation.judge("client-dma.write", good, asked.pretty(), _told(reply)):
                return
            found = self._behind(window, len(data))
            if original is not None:
                self._situation.judge(
                    "client-dma.write-data", found == data, data.hex(), (found or b"").hex()
                )
                self._write(window, original, None)

        self._queue.append((Command.DMA_WRITE, asked.encode() + data, then))

    def _nowhere(self) -> None:
        """Memory that was never mapped."""
        self._probed_nowhere = True
        windows = self._situation.windows.values()
        address = next(
            at
            for at in NOWHERE
            if not any(each.address <= at < each.address + each.length for each in windows)
        )

        def then(reply: Message) -> None:
            self._situation.judge("client-dma.unmapped", reply.refused, f"a refusal of {address:#x}", reply)

        self._queue.append((Command.DMA_READ, DmaAccess(address, 16).encode(), then))

    def _behind(self, window: ClientWindow, count: int) -> bytes | None:
        """The bytes behind the window's descriptor; None without one."""
        if window.fd < 0:
            return None
        try:
            return os.pread(window.fd, count, window.offset)
        except OSError:
            return None  # a file that can be mapped, but not read


def _told(reply: Message) -> str:
    return f"{reply}: {reply.payload[:24].hex()}"
