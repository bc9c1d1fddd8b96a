"""A whole running card whose driver's memory only the client reaches, and doorbells that are eventfds."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import trio

from device.errors import DeviceError
from device.virtio.net import CONTROL_QUEUE, RX_QUEUE, TX_QUEUE, LinkStatus
from device.virtio.transport import Status
from firmware import Nic
from tests.device.remote_side import Ask, Client, map_by_message
from tests.firmware.driver import CONFIG_VECTOR, Driver
from tests.firmware.test_nic import MAC, OTHER, Cable, frame

ADDR_SET = b"\1\1"
ANNOUNCE_ACK = b"\3\0"
OK = 0


class Remote(Driver):
    """A driver whose memory came without a descriptor."""

    def __init__(self, nic: Nic) -> None:
        super().__init__(nic)
        self.client = Client(self.memory)
        dma = self.function.dma
        with self.function.gate:
            dma.unmap_all()
            map_by_message(dma, self.client)

    def close(self) -> None:
        self.client.close()
        super().close()

    async def answer(self, *parts: bytes) -> int | None:
        """The answer to a control command, from a card that runs."""
        assert self.command(*parts) is None
        await self.interrupted(CONTROL_QUEUE)
        assert len(self.commands.used()) == 1
        return self.memory.read(self.memory.allocate(0, 16) - 16, 1)[0]


@pytest.fixture
def cable() -> Iterator[Cable]:
    cable = Cable()
    yield cable
    cable.network.close()


@pytest.fixture
def driver(cable: Cable) -> Iterator[Remote]:
    driver = Remote(Nic(cable, mac=MAC))
    yield driver
    driver.nic.close()
    driver.close()


async def traffic(cable: Cable, driver: Driver, count: int = 20) -> None:
    with trio.fail_after(20):
        for n in range(count):
            driver.send(frame(bytes([n])))
            await trio.lowlevel.wait_readable(cable.network)
            assert cable.network.recv(2000) == frame(bytes([n]))
            cable.network.send(frame(bytes([n])))
            assert await driver.receive() == frame(bytes([n]))


async def test_a_card_works_without_any_of_its_drivers_memory(
    cable: Cable, driver: Remote, nursery: trio.Nursery
) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start()
    await traffic(cable, driver)
    with trio.fail_after(10):
        assert await driver.answer(ADDR_SET + OTHER) == OK
    assert driver.mac == OTHER
    assert driver.status & Status.NEEDS_RESET == 0


async def test_while_a_command_waits_for_the_client_registers_are_served(
    driver: Remote, nursery: trio.Nursery
) -> None:
    """The client answers only when this thread has served it: one that waited itself would wait for ever."""
    nursery.start_soon(driver.nic.run)
    driver.start(buffers=0)
    token = trio.lowlevel.current_trio_token()
    seen: list[Ask] = []

    def meanwhile(ask: Ask) -> None:
        assert trio.from_thread.run_sync(lambda: driver.link_up, trio_token=token)
        seen.append(ask)

    driver.client.meanwhile = meanwhile
    with trio.fail_after(10):
        assert await driver.answer(ADDR_SET + OTHER) == OK
    assert len(seen) > 5


async def test_a_reset_while_a_command_waits_for_the_client_starts_over(driver: Remote) -> None:
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()

    def reset() -> None:
        driver.status = 0
        done.set()

    def meanwhile(ask: Ask) -> None:
        if ask[:2] == ("write", driver.commands.device + 4 + 8):  # its completion, the second one
            trio.from_thread.run_sync(reset, trio_token=token)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.nic.run)
            driver.start(buffers=0)
            assert await driver.answer(ADDR_SET + OTHER) == OK
            driver.client.meanwhile = meanwhile
            driver.command(ADDR_SET + OTHER)
            await done.wait()
            nursery.cancel_scope.cancel()  # ends when the threads have ended
    assert driver.commands.used() == []
    assert driver.mac == MAC
    assert driver.status == 0


async def test_a_command_whose_answer_is_held_up_by_a_stop_is_not_executed_twice(driver: Remote) -> None:
    """The second time there would be nothing to acknowledge."""
    driver.start(buffers=0)
    driver.nic.config.status |= LinkStatus.ANNOUNCE
    token = trio.lowlevel.current_trio_token()
    stopped = trio.Event()

    def stop_before_the_answer(ask: Ask) -> None:
        if ask[0] == "write" and ask[2] == 1:
            driver.client.meanwhile = lambda _: None
            driver.function.stop()
            trio.from_thread.run_sync(stopped.set, trio_token=token)

    driver.client.meanwhile = stop_before_the_answer
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(driver.nic.run)
            assert driver.command(ANNOUNCE_ACK) is None
            await stopped.wait()
            driver.function.run()
            assert driver.fired(CONTROL_QUEUE), "as for everything"
            await driver.interrupted(CONTROL_QUEUE)
            nursery.cancel_scope.cancel()
    assert len(driver.commands.used()) == 1
    assert driver.memory.read(driver.memory.allocate(0, 16) - 16, 1)[0] == OK


async def test_a_reset_is_complete_when_the_client_has_answered(driver: Remote) -> None:
    """virtio 1.3, 4.1.4.3.1: until then the status reads as before; the memory may still be written to."""
    token = trio.lowlevel.current_trio_token()
    done = trio.Event()
    during: list[Status] = []

    def reset() -> None:
        before = driver.status
        driver.status = 0
        during.extend((before, driver.status))
        done.set()

    def meanwhile(_: Ask) -> None:
        driver.client.meanwhile = lambda _: None
        trio.from_thread.run_sync(reset, trio_token=token)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            driver.start(buffers=0)
            driver.client.meanwhile = meanwhile
            nursery.start_soon(driver.nic.run)
            await done.wait()
            nursery.cancel_scope.cancel()
    assert during[0] == during[1] != 0
    assert driver.status == 0


async def test_a_client_that_refuses_a_command_has_a_card_that_needs_a_reset(
    driver: Remote, nursery: trio.Nursery
) -> None:
    nursery.start_soon(driver.nic.run)
    driver.start(buffers=0)

    def refuse(_: Ask) -> None:
        raise DeviceError(errno.EIO, "no")

    driver.client.meanwhile = refuse
    driver.command(ADDR_SET + OTHER)
    with trio.fail_after(10):
        await driver.interrupted(CONFIG_VECTOR)
    assert driver.status & Status.NEEDS_RESET


async def test_a_card_is_cancelled_when_the_client_has_answered(driver: Remote) -> None:
    async with trio.open_nursery() as nursery:
        driver.start(buffers=0)
        token = trio.lowlevel.current_trio_token()
        driver.client.meanwhile = lambda _: trio.from_thread.run_sync(
            nursery.cancel_scope.cancel, trio_token=token
        )
        nursery.start_soon(driver.nic.run)
        with trio.fail_after(10):
            await trio.sleep_forever()
    assert driver.status & Status.NEEDS_RESET == 0


# --- doorbells


class ByEventfd(Driver):
    """A driver whose doorbells never come as register accesses."""

    def ring_doorbell(self, queue: int) -> None:
        os.eventfd_write(self.nic.datapath.doorbell_fds[queue], 1)


@pytest.fixture
def silent(cable: Cable) -> Iterator[ByEventfd]:
    driver = ByEventfd(Nic(cable, mac=MAC))
    yield driver
    driver.nic.close()
    driver.close()


async def test_doorbells_by_eventfd_are_as_good_as_any(
    cable: Cable, silent: ByEventfd, nursery: trio.Nursery
) -> None:
    nursery.start_soon(silent.nic.run)
    silent.start()
    await traffic(cable, silent)
    silent.command(ADDR_SET + OTHER)
    with trio.fail_after(10):
        await silent.interrupted(CONTROL_QUEUE)
    assert silent.mac == OTHER
    with trio.fail_after(20):
        # A busy machine may let the worker find each frame before it asks for doorbells.
        while silent.nic.datapath.counters()["kicks"] == 0:
            await traffic(cable, silent, 1)


async def test_a_client_cannot_block_the_card_by_its_doorbells(
    cable: Cable, silent: ByEventfd, nursery: trio.Nursery
) -> None:
    """The files are the client's too: it reads them, lets them block, and fills them."""
    nursery.start_soon(silent.nic.run)
    silent.start()
    for fd in silent.nic.datapath.doorbell_fds:
        os.set_blocking(fd, True)
    for n in range(200):
        bell = silent.nic.datapath.doorbell_fds[n % 3]
        os.eventfd_write(bell, 1)
        os.set_blocking(bell, False)
        with suppress(BlockingIOError):
            os.eventfd_read(bell)
        os.set_blocking(bell, True)
        await trio.lowlevel.checkpoint()
    for fd in silent.nic.datapath.doorbell_fds:
        os.set_blocking(fd, False)
        os.eventfd_write(fd, (1 << 64) - 3)
    await traffic(cable, silent, 3)


def test_doorbells_stay_the_same_and_are_three(driver: Remote) -> None:
    fds = driver.nic.datapath.doorbell_fds
    assert len(set(fds)) == len({RX_QUEUE, TX_QUEUE, CONTROL_QUEUE})
    driver.start()
    driver.status = 0
    assert driver.nic.datapath.doorbell_fds == fds
