"""QEMU's monitor protocol: one JSON object a line; commands are answered in order, events come in between."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

import trio

Event = dict[str, Any]


class QmpError(RuntimeError):
    """QEMU refused a command; the message names the command and QEMU's reason."""


class _Pending:
    """A command on its way: set once the answer is there."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answer: dict[str, Any] = {}


class Qmp:
    """The client's end of a monitor. `run` must be running in a nursery for anything to arrive."""

    def __init__(self, stream: trio.SocketStream, on_event: Callable[[Event], None]) -> None:
        self._stream = stream
        self._on_event = on_event
        self._pending: deque[_Pending] = deque()
        self._sending = trio.Lock()
        self._closed = False
        self._events: list[Event] = []
        self._arrived = trio.Condition()

    async def run(self) -> None:
        """Read answers and events until QEMU closes the monitor; commands still waiting then fail."""
        buffer = b""
        try:
            async for chunk in self._stream:
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    if line.strip():
                        await self._take(json.loads(line))
        except trio.BrokenResourceError:
            pass
        finally:
            self._closed = True
            for pending in self._pending:
                pending.done.set()
            with trio.CancelScope(shield=True):
                async with self._arrived:
                    self._arrived.notify_all()

    async def _take(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._on_event(message)
            async with self._arrived:
                self._events.append(message)
                self._arrived.notify_all()
        elif "QMP" not in message:
            pending = self._pending.popleft()
            pending.answer = message
            pending.done.set()

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run one command and return what QEMU answers."""
        request = {"execute": command, "arguments": arguments}
        pending = _Pending()
        async with self._sending:
            if self._closed:
                raise QmpError(f"{command}: QEMU has gone")
            self._pending.append(pending)
            try:
                await self._stream.send_all(json.dumps(request).encode() + b"\n")
            except trio.BrokenResourceError as gone:
                raise QmpError(f"{command}: QEMU has gone") from gone
        await pending.done.wait()
        if "error" in pending.answer:
            raise QmpError(f"{command}: {pending.answer['error'].get('desc', 'no reason given')}")
        if "return" not in pending.answer:
            raise QmpError(f"{command}: QEMU went away before it answered")
        return pending.answer["return"]

    async def event(self, name: str, **data: Any) -> Event:
        """Wait for an event of this name whose data has these values; one that came earlier counts, once."""
        async with self._arrived:
            while True:
                for event in self._events:
                    about = event.get("data", {})
                    if event["event"] == name and all(about.get(key) == data[key] for key in data):
                        self._events.remove(event)
                        return event
                if self._closed:
                    raise QmpError(f"QEMU has gone without the event {name}")
                await self._arrived.wait()
