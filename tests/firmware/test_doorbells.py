"""Doorbells that are eventfds (vfio-user, VFIO_USER_DEVICE_GET_REGION_IO_FDS)."""

from __future__ import annotations

import os
import struct

import pytest
import trio
import trio.testing

from device.function import ResetKind
from device.profiles import DOORBELLS
from device.virtio.net import CONTROL_QUEUE
from device.virtio.transport import NOTIFY_STRIDE
from tests.firmware.driver import CONFIG_REGION, MEMORY_AND_BUS_MASTER
from tests.firmware.test_nic import OTHER
from tests.firmware.travellers import loopback, number, numbered, travelling


async def test_an_eventfd_is_as_good_as_a_doorbell(nursery: trio.Nursery) -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        areas = driver.function.io_eventfds(0)
        assert [(area.offset, area.size, area.datamatch) for area in areas] == [
            (DOORBELLS + NOTIFY_STRIDE * queue, 2, None) for queue in range(len(areas))
        ]
        async with trio.open_nursery() as inner:
            inner.start_soon(driver.nic.run)
            driver.start()
            await trio.testing.wait_all_tasks_blocked()
            driver.ring_doorbell = lambda queue: os.eventfd_write(areas[queue].fd, 1)  # type: ignore[method-assign]
            with trio.fail_after(10):
                for value in range(3):
                    driver.send(numbered(value))
                    assert number(await driver.receive()) == value
                driver.command(b"\1\1" + OTHER)
                await driver.interrupted(CONTROL_QUEUE)
                assert driver.mac == OTHER
            inner.cancel_scope.cancel()


async def test_a_client_that_left_can_neither_ring_nor_silence_the_doorbells_of_the_next() -> None:
    with travelling(loopback) as travellers:
        driver = travellers.driver
        kept = [os.dup(area.fd) for area in driver.function.io_eventfds(0)]
        async with trio.open_nursery() as inner:
            inner.start_soon(driver.nic.run)
            await trio.testing.wait_all_tasks_blocked()
            driver.function.reset(ResetKind.LOST_CLIENT)
            travellers.welcome(driver.nic)
            driver.function.region_write(CONFIG_REGION, 4, struct.pack("<H", MEMORY_AND_BUS_MASTER))
            areas = driver.function.io_eventfds(0)
            for fd, area in zip(kept, areas, strict=True):
                os.eventfd_write(area.fd, 1)
                with pytest.raises(BlockingIOError):
                    os.eventfd_read(fd)
                assert not os.get_inheritable(area.fd)
            driver.start()
            await trio.testing.wait_all_tasks_blocked()
            driver.ring_doorbell = lambda queue: os.eventfd_write(areas[queue].fd, 1)  # type: ignore[method-assign]
            with trio.fail_after(10):
                for value in range(3):
                    driver.send(numbered(value))
                    assert number(await driver.receive()) == value
                driver.command(b"\1\1" + OTHER)
                await driver.interrupted(CONTROL_QUEUE)
                assert driver.mac == OTHER
            for fd in kept:
                os.eventfd_write(fd, 1)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert [os.eventfd_read(fd) for fd in kept] == [1] * len(kept)
            inner.cancel_scope.cancel()
        for fd in kept:
            os.close(fd)
