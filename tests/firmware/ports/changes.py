"""Following a port while it runs."""

from __future__ import annotations

import trio

from firmware.ports import Port


class Changes:
    """Runs `port` in `nursery` and hears of its changes, of each one in turn."""

    def __init__(self, port: Port, nursery: trio.Nursery) -> None:
        self._send, self._receive = trio.open_memory_channel[bool](100)
        port.on_change = lambda: self._send.send_nowait(port.link_up)
        nursery.start_soon(port.run)

    async def link(self) -> bool:
        """Whether the link was up after the next change."""
        return await self._receive.receive()
