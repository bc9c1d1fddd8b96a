"""Posted writes to configuration space: nobody can be waited for before they leave."""

from __future__ import annotations

import pytest
import trio
import trio.testing

import client
from client.pci import read_config
from protocol.vfio import RegionIndex
from tests.client import pci_device as pci
from tests.client.followers import followed, letting_go
from tests.client.pci_device import pci_device

POSTED = {
    "COMMAND": (pci.COMMAND, pci.MEMORY_OFF),
    "D3hot": (pci.PM + 4, pci.D3_HOT),
    "FLR": (pci.PCIE + 8, pci.FLR),
    "AF FLR": (pci.AF + 4, pci.AF_FLR),
}


@pytest.mark.parametrize(("offset", "data"), POSTED.values(), ids=POSTED.keys())
async def test_a_posted_write_must_not_switch_bars_that_are_in_use(offset: int, data: bytes) -> None:
    async with followed() as (device, follower):
        await read_config(device.session)
        with pytest.raises(client.ClientError, match="must not switch the BARs while they are in use"):
            device.session.post_write_now(RegionIndex.CONFIG, offset, data)
        with pytest.raises(client.ClientError, match="must not switch"):
            await device.session.post_write(RegionIndex.CONFIG, offset, data)
        assert (follower.log, device.log) == ([], [])


async def test_nor_must_one_by_way_of_a_bar() -> None:
    async with followed() as (device, _):
        with (
            client.Bar(device.session, RegionIndex.CONFIG) as config,
            pytest.raises(client.ClientError, match="must not switch"),
        ):
            config.post(pci.COMMAND, 2, 0)


async def test_nor_bring_them_back() -> None:
    async with followed() as (device, _):
        await device.switch(memory=False)
        with pytest.raises(client.ClientError, match="must not switch"):
            device.session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, pci.MEMORY_ON)
        device.session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, pci.MEMORY_OFF)


async def test_nor_come_in_between_while_they_are_being_switched() -> None:
    async with followed() as (device, follower), letting_go(device, follower):
        for data in (pci.MEMORY_ON, pci.MEMORY_OFF):
            with pytest.raises(client.ClientError, match="must not switch"):
                device.session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, data)
        follower.go.set()


async def test_nor_overtake_the_answer_to_one_that_is_waited_for_though_nobody_uses_them() -> None:
    async with pci_device() as device:
        decoding, answered = device.session.decoding, trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(decoding.around_write, pci.COMMAND, pci.MEMORY_ON, answered.wait)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(client.ClientError, match="must not switch"):
                device.session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, pci.MEMORY_OFF)
            answered.set()
        assert decoding.enabled


async def test_a_posted_write_to_capabilities_that_nobody_has_read_is_refused_while_bars_are_in_use() -> None:
    async with followed() as (device, _):
        with pytest.raises(client.ClientError, match="nobody has read"):
            device.session.post_write_now(RegionIndex.CONFIG, 0xC0, b"\0")
        device.session.post_write_now(RegionIndex.CONFIG, 0x3C, b"\0\0\0\0")
        await read_config(device.session)
        device.session.post_write_now(RegionIndex.CONFIG, 0xC0, b"\0")


async def test_a_posted_write_that_switches_nothing_is_let_through() -> None:
    async with followed() as (device, follower):
        device.session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, b"\6\0")
        await read_config(device.session)
        device.session.post_write_now(RegionIndex.CONFIG, pci.PM + 4, b"\0\x80")
        await read_config(device.session)
        assert follower.log == ["write", "write"]


async def test_while_nobody_uses_them_posted_writes_switch_bars_as_others_do() -> None:
    async with pci_device() as device:
        session = device.session
        session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, pci.MEMORY_OFF)
        assert not session.decoding.enabled
        session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, pci.MEMORY_ON)
        assert session.decoding.enabled
        await device.switch(memory=False)
        session.post_write_now(RegionIndex.CONFIG, pci.COMMAND, pci.MEMORY_ON)
        assert session.decoding.enabled
        await session.reset()
        assert not session.decoding.enabled
