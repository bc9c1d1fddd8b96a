from __future__ import annotations

import os
import struct

import pytest
import trio

import client
from tests.client.bar_files import memory
from tests.client.peer import NO_REPLY, REGION_READ, REGION_WRITE, FakeRegion, session_with
from tests.client.test_connecting import sparse


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
