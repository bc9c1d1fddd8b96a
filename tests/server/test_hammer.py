"""Clients that do whatever comes to their minds, each seed another one: the card must outlive them all."""

import os
import random
import struct
from pathlib import Path

import pytest
import trio

from device.function import ResetKind
from tests.descriptors import open_fds, settled_fds
from tests.server.raw import (
    DMA_MAP,
    DMA_UNMAP,
    GET_INFO,
    GET_IRQ_INFO,
    GET_REGION_INFO,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_IRQS,
    RawClient,
    access,
    dma,
    irqs,
    message,
)
from tests.server.world import PAGE, World, world

CLIENTS = 4
MESSAGES = 150


class Mind:
    """Makes up messages that are often right and sometimes not, with descriptors that fit or not."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.memory = os.memfd_create("guest")
        os.truncate(self.memory, 8 * PAGE)
        self.event = os.eventfd(0, os.EFD_NONBLOCK)

    def close(self) -> None:
        """Close the descriptors that are sent."""
        os.close(self.memory)
        os.close(self.event)

    def message(self) -> tuple[bytes, list[int]]:
        """The next message and its descriptors."""
        pick = self.chance
        fds: list[int] = []
        payload = b""
        match command := pick.choice([*range(1, 20), REGION_READ, REGION_WRITE, DMA_MAP, SET_IRQS]):
            case 1:
                payload = b"\0\0\1\0{}\0"
            case _ if command == DMA_MAP:
                payload = dma(
                    PAGE * pick.randrange(8), PAGE * pick.randrange(4), offset=PAGE * pick.randrange(4)
                )
                fds = [self.memory] * pick.randrange(3)
            case _ if command == DMA_UNMAP:
                payload = struct.pack("=IIQQ", 24, pick.choice([0, 0, 2]), PAGE * pick.randrange(8), PAGE)
            case _ if command in (GET_INFO, GET_IRQ_INFO):
                payload = struct.pack("=IIII", 16, 0, pick.randrange(7), 0)
            case _ if command == GET_REGION_INFO:
                payload = struct.pack("=IIIIQQ", 32, 0, pick.randrange(10), 0, 0, 0)
            case _ if command == SET_IRQS:
                count = pick.randrange(4)
                data, action = pick.choice([1, 2, 4]), pick.choice([8, 16, 32, 32])
                payload = irqs(
                    data | action,
                    pick.randrange(6),
                    pick.choice([0, 0, 1]),
                    count,
                    bytes(count * (data == 2)),
                )
                fds = [self.event] * (count if data == 4 else 0)
            case _ if command == REGION_READ:
                payload = access(
                    pick.randrange(5000), pick.randrange(9), pick.choice([1, 2, 4, 8, 100, 5000])
                )
            case _ if command == REGION_WRITE:
                content = pick.randbytes(pick.choice([1, 2, 4, 8, 100, 5000]))
                payload = access(pick.randrange(5000), pick.randrange(9), len(content)) + content
            case _ if command != RESET:
                payload = pick.randbytes(pick.randrange(40))
        if pick.random() < 0.05:
            payload = payload[: pick.randrange(len(payload) + 1)]
        if pick.random() < 0.05:
            fds = [self.memory, self.event] * pick.choice([1, 4, 20])
        flags = pick.choice([0, 0, 0, 0, NO_REPLY])
        return message(command, payload, message_id=pick.randrange(1 << 16), flags=flags), fds


async def live(client: RawClient, mind: Mind) -> None:
    """Send messages, in pieces now and then, until they are all sent or the server has had enough."""
    try:
        for _ in range(MESSAGES):
            data, fds = mind.message()
            cut = mind.chance.randrange(1, len(data)) if mind.chance.random() < 0.2 else len(data)
            await client.send(data[:cut], fds)
            if cut < len(data):
                await client.send(data[cut:])
        if mind.chance.random() < 0.5:
            await client.send(mind.message()[0][:10], [mind.event])
    except (BrokenPipeError, ConnectionResetError):
        return
    if mind.chance.random() < 0.5:
        await trio.testing.wait_all_tasks_blocked()


async def read_on(client: RawClient) -> None:
    """Take every reply."""
    while (reply := await client.receive()) is not None:
        reply.close()


@pytest.mark.parametrize("seed", range(12))
async def test_the_card_outlives_its_clients(tmp_path: Path, seed: int) -> None:
    async with world(tmp_path) as served:
        before = len(settled_fds())
        for number in range(CLIENTS):
            mind = Mind(seed * CLIENTS + number)
            client = await served.client()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_on, client)
                await live(client, mind)
                nursery.cancel_scope.cancel()
            client.close()
            mind.close()
            await _is_fresh(served)
        assert len(open_fds()) == before
        assert ResetKind.LOST_CLIENT in served.card.resets


async def _is_fresh(served: World) -> None:
    """A new client finds nothing of the old one."""
    client = await served.client()
    assert len(served.function.dma) == 0
    assert served.function.interrupts.active is None
    assert served.function.unmask_fd is None
    assert await client.read(2, 0, 64) == bytes(64)
    client.close()
    await trio.testing.wait_all_tasks_blocked()
