from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from client.dma import DmaBuffer
from client.errors import ClientError
from client.virtio._ring import Ring
from client.virtio.control import SLOT_SIZE, SLOTS, Command, ControlQueue, mac_table


def a_queue() -> tuple[ControlQueue, list[None]]:
    kicks: list[None] = []
    memory = memoryview(bytearray(SLOTS * SLOT_SIZE))
    ring = Ring(bytearray(4096), 0x1000, 32)
    return ControlQueue(ring, DmaBuffer(0x10000, memory), lambda: kicks.append(None)), kicks


async def test_a_command_that_is_too_long_is_refused() -> None:
    queue, kicks = a_queue()
    with pytest.raises(ClientError, match="4094 bytes"):
        await queue.command(Command.MAC_TABLE, bytes(4094))
    assert kicks == []


async def test_what_nobody_waits_for_is_dropped_when_there_is_no_room(nursery: trio.Nursery) -> None:
    queue, kicks = a_queue()
    for _ in range(SLOTS):
        nursery.start_soon(queue.command, Command.MAC_TABLE)
    await wait_all_tasks_blocked()
    queue.once(Command.ANNOUNCED)()
    assert len(kicks) == SLOTS
    nursery.cancel_scope.cancel()


def test_what_is_read_beside_a_command_sends_no_other() -> None:
    queue, kicks = a_queue()
    first, second = queue.once(Command.ANNOUNCED), queue.once(Command.ANNOUNCED)
    first()
    second()
    queue.once(Command.ANNOUNCED)()
    assert len(kicks) == 1


async def test_after_the_end_nothing_is_sent() -> None:
    queue, kicks = a_queue()
    queue.close()
    with pytest.raises(ClientError, match="reset"):
        await queue.command(Command.ANNOUNCED)
    queue.once(Command.ANNOUNCED)()
    assert kicks == []


def test_addresses_have_six_bytes() -> None:
    with pytest.raises(ClientError, match="of 5 bytes"):
        mac_table([bytes(5)], [])
