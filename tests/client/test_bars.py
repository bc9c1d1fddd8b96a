from __future__ import annotations

import os
import struct
from errno import EIO

import pytest
import trio

import client
from client.pci import read_config
from tests.client.bar_files import memory
from tests.client.pci_device import pci_device
from tests.client.peer import NO_REPLY, REGION_READ, REGION_WRITE, FakeRegion, session_with
from tests.client.test_connecting import sparse

HERE = int.from_bytes(b"here", "little")
MESSAGE = int.from_bytes(b"mmmm", "little")
"""What BAR 0 of the scripted function says, by its memory and by message."""


async def test_a_bar_uses_its_mapping_where_it_can_and_messages_elsewhere() -> None:
    with memory(0x4000) as fd:
        regions = {0: FakeRegion(0x4000, 7, sparse((0x3000, 0x1000)), (fd,))}
        async with session_with(regions=regions) as (session, peer), trio.open_nursery() as nursery:

            async def serve() -> None:
                message = await peer.expect(REGION_READ)
                assert message.payload == struct.pack("=QII", 0x14, 0, 1)
                peer.reply(message, message.payload + b"\x0f")
                message = await peer.expect(REGION_WRITE)
                assert message.payload == struct.pack("=QII", 0x16, 0, 2) + struct.pack("=H", 0x1234)
                peer.reply(message, message.payload[:16])
                message = await peer.expect(REGION_WRITE)
                assert message.flags == NO_REPLY
                assert message.payload == struct.pack("=QII", 0x18, 0, 4) + struct.pack("=I", 7)

            nursery.start_soon(serve)
            with client.Bar(session, 0) as bar:
                assert await bar.read(0x14, 1) == 0x0F
                await bar.write(0x16, 2, 0x1234)
                bar.post(0x18, 4, 7)
                bar.post(0x3000, 2, 0xBEEF)
                await bar.write(0x3004, 4, 0xCAFE)
                assert os.pread(fd, 8, 0x3000) == struct.pack("=HHI", 0xBEEF, 0, 0xCAFE)
                assert await bar.read(0x3000, 2) == 0xBEEF


async def test_a_bar_that_is_not_there_is_refused() -> None:
    async with session_with() as (session, _):
        with pytest.raises(client.ClientError, match="no region 3"):
            client.Bar(session, 3)


async def test_while_memory_is_off_a_bar_goes_by_message_and_the_server_says_what_it_likes() -> None:
    async with pci_device() as device:
        bar = client.Bar(device.session, 0)
        assert await bar.read(0, 4) == HERE
        await device.switch(memory=False)
        assert await bar.read(0, 4) == MESSAGE
        device.bar_errno = EIO
        with pytest.raises(client.ServerError, match="EIO"):
            await bar.read(0, 4)
        with pytest.raises(client.ServerError, match="EIO"):
            await bar.write(0, 4, 1)
        device.bar_errno = 0
        await bar.write(0, 4, 1)
        bar.post(4, 4, 2)
        await device.switch(memory=True)
        assert [(offset, data[0]) for region, offset, data in device.log if region == 0] == [(0, 1), (4, 2)]
        assert await bar.read(0, 4) == HERE, "as if nothing had been written there"
        bar.close()


async def test_a_bar_that_is_made_while_memory_is_off_is_mapped_when_it_is_on() -> None:
    async with pci_device() as device:
        await device.switch(memory=False)
        os.truncate(device.fd, 0)
        with client.Bar(device.session, 0) as bar:
            assert await bar.read(0, 4) == MESSAGE
            device.give_back()
            await device.switch(memory=True)
            assert await bar.read(0, 4) == HERE


async def test_what_the_server_takes_away_by_itself_is_read_and_written_by_message() -> None:
    async with pci_device() as device:
        with client.Bar(device.session, 0) as bar:
            assert bar.mapping is not None
            await bar.write(0x10, 4, 7)
            device.cut()
            with pytest.raises(client.ServerError, match="EIO"):
                await bar.read(0x10, 4)
            with pytest.raises(client.ServerError, match="EIO"):
                await bar.write(0x10, 4, 8)
            device.give_back()
            assert await bar.read(0, 4) == MESSAGE, "until it is faulted in again"
            bar.mapping.fault()
            assert await bar.read(0, 4) == HERE


async def test_a_store_that_finds_its_page_gone_is_sent_instead() -> None:
    async with pci_device() as device:
        with client.Bar(device.session, 0) as bar:
            await bar.write(0, 4, 7)
            os.truncate(device.fd, 0)
            await bar.write(0, 4, 8)
            bar.post(4, 4, 9)
            await read_config(device.session)
            assert [(offset, data[0]) for _, offset, data in device.log] == [(0, 8), (4, 9)]


async def test_what_is_left_before_the_cut_is_still_mapped() -> None:
    async with pci_device() as device:
        with client.Bar(device.session, 0) as bar:
            await bar.write(0x1000, 4, 7)
            os.truncate(device.fd, 0x1000)
            assert await bar.read(0x1000, 4) == MESSAGE
            assert await bar.read(0, 4) == HERE


async def test_a_file_that_is_too_short_is_asked_for_by_message_until_it_is_long_enough() -> None:
    async with pci_device() as device:
        os.truncate(device.fd, 0)
        with client.Bar(device.session, 0) as bar:
            assert await bar.read(0, 4) == MESSAGE
            device.give_back()
            assert await bar.read(0, 4) == HERE


async def test_an_access_that_is_not_aligned_is_refused_where_it_is_mapped() -> None:
    async with pci_device() as device:
        with client.Bar(device.session, 0) as bar:
            with pytest.raises(client.ClientError, match="not aligned"):
                await bar.read(1, 2)
            with pytest.raises(client.ClientError, match="not aligned"):
                await bar.write(2, 4, 0)


async def test_a_read_only_bar_is_not_written_to_where_it_is_mapped() -> None:
    with memory(0x1000) as fd:
        async with pci_device(bar=FakeRegion(0x1000, 5, b"", (fd,))) as device:
            with client.Bar(device.session, 0) as bar, pytest.raises(client.ClientError, match="read-only"):
                await bar.write(0, 4, 1)
            assert device.log == []


async def test_memory_decoding_is_nobodys_affair_but_the_bars() -> None:
    """The kernel zaps from BAR 0 up to the ROM."""
    with memory(0x1000) as fd:
        regions = {index: FakeRegion(0x1000, 7, b"", (fd,)) for index in (5, 6)}
        async with session_with(regions=regions) as (session, _):
            with client.Bar(session, 5) as bar, client.Bar(session, 6) as rom:
                assert bar.mapping is not None
                assert rom.mapping is not None
                assert (bar.mapping.decoding, rom.mapping.decoding) == (session.decoding, None)
