"""A card that is served in this process, and a session with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.client.irqchip.card import Card, Link
from tests.descriptors import no_fd_leaks


@asynccontextmanager
async def linked() -> AsyncIterator[tuple[Card, Link]]:
    """A card and a session with it."""
    with no_fd_leaks():
        card = Card()
        async with trio.open_nursery() as nursery:
            link = Link(card)
            await nursery.start(link.run)
            yield card, link
            await link.end()
        card.close()
