"""The library takes nothing away that somebody holds."""

import errno
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from device.migration.migration import Migration
from protocol.limits import UNPIN_TIMEOUT
from server.libvfio_user import Library, Limit, serve
from server.libvfio_user._leaving import check_pins
from tests.server.raw import DMA_UNMAP, ERROR, FEATURE, GET_INFO, RawClient, message
from tests.server.test_features import RUNNING, STOP, current, state
from tests.server.test_unpinning import ALL, INFO, IOVA, asking, map_window, mapped, unmap
from tests.server.world import PAGE, Card, World, world

READ, WRITE = 1, 2


@pytest.fixture
async def client(served: World) -> RawClient:
    """A client with a window of 16 pages."""
    return await mapped(served)


@pytest.mark.parametrize("flags", [0, ALL])
async def test_an_unmap_is_the_librarys_when_the_memory_is_released(
    served: World, client: RawClient, flags: int, mock_clock: trio.testing.MockClock
) -> None:
    memory = served.function.dma
    pin = memory.pin(IOVA, 1, WRITE, "test")
    async with asking(client, DMA_UNMAP, unmap(flags)) as ask:
        assert await ask.waits()
        with pytest.raises(DeviceError) as refused:
            memory.pin(IOVA, 1, READ, "test")
        assert refused.value.errno == errno.EAGAIN
        memory.write(IOVA, b"still there")
        await trio.to_thread.run_sync(pin.release)
        assert not (await ask.reply()).flags & ERROR
    assert len(memory) == 0


async def test_an_unmap_of_what_nobody_holds_does_not_wait(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    await map_window(client, 0)
    with served.function.dma.pin(IOVA, 1, READ, "test"):
        await client.do(DMA_UNMAP, unmap(address=0))


async def test_nothing_is_pinned_between_the_look_and_the_librarys_unmap(
    served: World, client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window would stay, though the library has unmapped what it shows."""
    pinned: list[str] = []

    def pin() -> None:
        try:
            served.function.dma.pin(IOVA, 1, READ, "late").release()
            pinned.append("in time")
        except DeviceError as error:
            pinned.append(os.strerror(error.errno or 0))

    def check(*args: Any) -> None:
        check_pins(*args)
        thread.start()
        thread.join(0.05)

    thread = threading.Thread(target=lambda: gated(served.function, pin))
    monkeypatch.setattr("server.libvfio_user._session.check_pins", check)
    await client.do(DMA_UNMAP, unmap())
    await trio.to_thread.run_sync(thread.join)
    assert pinned == ["Bad address"]
    assert len(served.function.dma) == 0


def gated(function: PciFunction, act: Callable[[], None]) -> None:
    with function.gate:
        act()


async def test_a_holder_that_does_not_let_go_is_named_and_the_window_stays(
    served: World,
    client: RawClient,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served.function.dma.pin(IOVA, 1, READ, "the copy engine"):
        begun = trio.current_time()
        assert await client.refused(DMA_UNMAP, unmap()) == errno.EBUSY
        assert trio.current_time() - begun == pytest.approx(UNPIN_TIMEOUT)
        served.function.dma.write(IOVA, b"usable")
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        "card: DMA_UNMAP given up after 1 s: memory at 0x100000 to 0x10ffff is held by the copy engine"
    ]
    await client.do(DMA_UNMAP, unmap())


async def test_what_is_held_when_the_client_leaves_outlives_the_librarys_mapping(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    pin = served.function.dma.pin(IOVA + PAGE - 1, 2, READ | WRITE, "test")
    served.function.dma.write(IOVA + PAGE - 1, b"ab")
    await client.send(message(DMA_UNMAP, unmap(), message_id=1) + message(GET_INFO, INFO, message_id=2))
    await trio.testing.wait_all_tasks_blocked()
    client.close()
    another = await served.client()
    assert served.card.resets == [ResetKind.LOST_CLIENT]
    assert pin.revoked
    assert bytes(pin.views[0]) == b"ab"
    await map_window(another)
    pin.release()
    counters = served.function.dma.pins.counters
    assert counters.acquired == counters.released == 2
    await another.do(DMA_UNMAP, unmap())


@pytest.mark.needs_no(Limit.DEVICE_FEATURE)
async def test_a_card_stops_when_the_memory_is_released(
    tmp_path: Path, library: Library, autojump_clock: trio.testing.MockClock
) -> None:
    card = Card()
    card.function.migration = Migration(card.function)
    async with world(tmp_path, by=partial(serve, library=library), card=card) as served:
        client = await mapped(served)
        pin = served.function.dma.pin(IOVA, 1, WRITE, "test")
        assert await client.refused(FEATURE, state(STOP)) == errno.EBUSY
        assert await current(client) == RUNNING
        pin.release()
        await client.do(FEATURE, state(STOP))
        assert not served.function.running
