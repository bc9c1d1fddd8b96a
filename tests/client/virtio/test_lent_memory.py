"""A driver whose queues lie in memory that its caller lent it, and may lose."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from client import ClientError, DeviceError
from client.dma import Arena, dma_memory
from client.virtio import NetDriver, open_net
from client.virtio._ring import ring_layout
from client.virtio.net import MEMORY_GONE
from tests.client.virtio.fake_nic import FakeNic, session_with_nic

SIZE = 4 << 20
QUEUE_SIZE = 64


class Lent(Arena):
    """Memory that can be taken away and given back."""

    def __init__(self, view: memoryview, iova: int) -> None:
        super().__init__(view, iova)
        self.gone = trio.Event()

    @property
    def present(self) -> bool:
        return not self.gone.is_set()

    async def wait_gone(self) -> None:
        await self.gone.wait()

    def take(self) -> None:
        """What the receive queue, the first there, says of used buffers is nonsense from now on."""
        used = ring_layout(QUEUE_SIZE)[2]
        self.view[used : used + 4] = b"\xff" * 4
        self.gone.set()

    def give(self) -> None:
        self.gone = trio.Event()


@asynccontextmanager
async def driving(size: int = SIZE) -> AsyncIterator[tuple[NetDriver, Lent]]:
    with trio.fail_after(20):
        async with (
            session_with_nic(FakeNic(queue_size=QUEUE_SIZE)) as session,
            dma_memory(session, size) as window,
        ):
            lent = Lent(window.view[:], window.iova)
            try:
                async with open_net(session, memory=lent) as driver:
                    yield driver, lent
            finally:
                lent.close()


async def turns() -> None:
    """A few of the scheduler, while a driver starts, which takes some hundred."""
    for _ in range(5):
        await trio.lowlevel.checkpoint()


async def echo(driver: NetDriver) -> None:
    await driver.send(bytes(60))
    assert await driver.receive() == bytes(60)


async def test_queues_and_frames_lie_in_it() -> None:
    async with driving() as (driver, lent):
        await driver.send(b"frame of mine".ljust(60, b"\0"))
        await driver.receive()
        assert driver.memory is lent
        assert b"frame of mine" in bytes(lent.view)


async def test_whoever_waits_when_it_goes_hears_why() -> None:
    async def receive(driver: NetDriver) -> None:
        with pytest.raises(DeviceError, match=MEMORY_GONE):
            await driver.receive()

    async with driving() as (driver, lent), trio.open_nursery() as nursery:
        nursery.start_soon(receive, driver)
        await trio.testing.wait_all_tasks_blocked()
        lent.take()


async def test_a_driver_that_finds_nonsense_there_blames_nobody_else() -> None:
    async with driving() as (driver, lent):
        lent.take()
        with pytest.raises(DeviceError, match=MEMORY_GONE):
            driver.receive_burst()


async def test_it_cannot_start_without_and_starts_anew_when_it_is_back() -> None:
    async with driving() as (driver, lent):
        await echo(driver)
        lent.take()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(DeviceError, match=MEMORY_GONE):
            await driver.reset()
        lent.give()
        with pytest.raises(DeviceError, match=MEMORY_GONE):
            driver.send_burst([bytes(60)])
        await driver.reset()
        await echo(driver)


async def test_it_does_not_start_in_memory_that_goes_meanwhile_even_if_it_comes_back() -> None:
    async def reset(driver: NetDriver) -> None:
        with pytest.raises(DeviceError, match=MEMORY_GONE):
            await driver.reset()

    async with driving() as (driver, lent):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reset, driver)
            await turns()
            lent.take()
            await turns()
            lent.give()
        with pytest.raises(DeviceError, match=MEMORY_GONE):
            await driver.receive()
        await driver.reset()
        await echo(driver)


async def test_too_little_of_it_is_refused() -> None:
    with pytest.raises(ClientError, match="are left"):
        async with driving(4096):
            pass
