"""What a check is given: the server under test, one connection at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from conformance._messages import JSON
from conformance._peer import CAPABILITIES, HungUp, Peer
from conformance.checks import Failed, GoneError
from conformance.hosts import Host
from protocol import Command
from protocol.messages import DeviceInfo


class Server:
    """The server under test. A server that has one client at a time is respected: each connection is closed
    before the next is made, unless a check is about just that.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.patience = host.patience

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Peer]:
        """A connection on which nothing was said."""
        peer = Peer(await self.host.open(), self.patience)
        try:
            yield peer
        finally:
            peer.close()

    @asynccontextmanager
    async def session(self, capabilities: JSON | None = CAPABILITIES) -> AsyncIterator[Peer]:
        """A connection on which a version is agreed on."""
        async with self.connect() as peer:
            await peer.negotiate(capabilities)
            yield peer

    async def eventually(self, condition: Callable[[], bool], expected: str) -> None:
        """Wait for what the server does without a word; `Failed` if it does not in time."""
        with trio.move_on_after(self.patience):
            while not condition():  # noqa: ASYNC110  nobody tells when another process is done
                await trio.sleep(self.patience / 100)
            return
        raise Failed(expected, f"nothing of it within {self.patience:g} s")

    async def serves_on(self, after: str) -> None:
        """The next client is served as if nothing had been; a server of its own will may have ended."""
        wanted = f"that the next client is served, after {after}"
        try:
            async with self.session() as peer:
                await peer.granted(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.size))
        except GoneError as error:
            raise Failed(wanted, str(error)) from None
        except Failed as failure:
            if not (isinstance(failure, HungUp) and await self.host.ended()):
                raise Failed(wanted, f"instead of {failure.expected}: {failure.came}") from None
