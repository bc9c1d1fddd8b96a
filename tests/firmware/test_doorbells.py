"""Doorbells that are eventfds (vfio-user, VFIO_USER_DEVICE_GET_REGION_IO_FDS)."""

from __future__ import annotations

import os

import trio
import trio.testing

from device.card import DOORBELLS
from device.virtio.net import CONTROL_QUEUE
from device.virtio.transport import NOTIFY_STRIDE
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
