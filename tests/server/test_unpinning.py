"""A client whose memory is held: what waits for the holder, how long, and what goes on meanwhile."""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from device.dma import MAX_PINS, PinCounters
from device.errors import DeviceError
from device.function import PciFunction, ResetKind
from device.migration.migration import Migration
from device.migration.states import DeviceState
from protocol.limits import UNMAP_TIMEOUT, UNPIN_TIMEOUT
from server import serve
from tests.server.raw import (
    DMA_MAP,
    DMA_UNMAP,
    ERROR,
    FEATURE,
    GET_INFO,
    Message,
    RawClient,
    connect,
    dma,
    message,
)
from tests.server.test_dma import dirty, start
from tests.server.test_features import PRE_COPY, RUNNING, STOP, STOP_COPY, current, state
from tests.server.world import PAGE, Card, World

# Where a test has `mock_clock` time stands still: nothing happens because somebody has waited long enough.

READ, WRITE = 1, 2
IOVA = 0x10_0000
SIZE = 16 * PAGE
BITMAP, ALL = 1, 2
INFO = struct.pack("=IIII", 16, 0, 0, 0)


def unmap(flags: int = 0, address: int = IOVA, size: int = SIZE) -> bytes:
    """The payload of a DMA_UNMAP of any kind."""
    if flags == ALL:
        address = size = 0
    bitmap = struct.pack("=QQ", PAGE, 8) if flags == BITMAP else b""
    return struct.pack("=IIQQ", 24 + len(bitmap) + (8 if bitmap else 0), flags, address, size) + bitmap


async def mapped(served: World, iova: int = IOVA, size: int = SIZE) -> RawClient:
    """A client with a window."""
    client = await served.client()
    await map_window(client, iova, size)
    return client


async def map_window(client: RawClient, iova: int = IOVA, size: int = SIZE) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, size)
    await client.do(DMA_MAP, dma(iova, size), [fd])
    os.close(fd)


class Asking:
    """A request that waits for its answer."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._reply: Message | None = None
        self._came = trio.Event()

    async def run(self, command: int, payload: bytes) -> None:
        self._reply = await self._client.ask(command, payload)
        self._came.set()

    async def waits(self) -> bool:
        await trio.testing.wait_all_tasks_blocked()
        return self._reply is None

    async def reply(self) -> Message:
        await self._came.wait()
        assert self._reply is not None
        return self._reply


@asynccontextmanager
async def asking(client: RawClient, command: int, payload: bytes) -> AsyncIterator[Asking]:
    async with trio.open_nursery() as nursery:
        ask = Asking(client)
        nursery.start_soon(ask.run, command, payload)
        yield ask


def balance(function: PciFunction) -> int:
    counters = function.dma.pins.counters
    return counters.acquired - counters.released


@pytest.fixture
async def client(served: World) -> RawClient:
    """A client with a window of 16 pages, of a card that can be moved."""
    served.function.migration = Migration(served.function)
    return await mapped(served)


# --- unmapping waits


@pytest.mark.parametrize("flags", [0, BITMAP, ALL])
async def test_an_unmap_of_any_kind_is_answered_when_the_memory_is_released(
    served: World, client: RawClient, flags: int, mock_clock: trio.testing.MockClock
) -> None:
    await client.do(FEATURE, start())
    memory = served.function.dma
    pin = memory.pin(IOVA, 1, WRITE, "test")
    async with asking(client, DMA_UNMAP, unmap(flags)) as ask:
        assert await ask.waits()
        memory.write(IOVA, b"still there")
        pin.release()
        reply = await ask.reply()
    assert not reply.flags & ERROR
    assert len(memory) == 0
    assert balance(served.function) == 0


async def test_the_bitmap_of_an_unmap_has_what_was_held_until_then(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    await client.do(FEATURE, start())
    pin = served.function.dma.pin(IOVA + 3 * PAGE, PAGE + 1, WRITE, "test")
    assert await dirty(client, IOVA, SIZE) == {3, 4}
    async with asking(client, DMA_UNMAP, unmap(BITMAP)) as ask:
        assert await ask.waits()
        pin.release()
        reply = await ask.reply()
    assert int.from_bytes(reply.payload[40:], "little") == 0b11000


async def test_an_unmap_of_what_nobody_holds_does_not_wait(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    await map_window(client, 0)
    with served.function.dma.pin(IOVA, 1, READ, "test"):
        await client.do(DMA_UNMAP, unmap(address=0))


async def test_while_it_waits_nothing_new_is_pinned_there_and_elsewhere_it_is(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    await map_window(client, 0)
    memory = served.function.dma
    pin = memory.pin(IOVA, 1, READ, "test")
    async with asking(client, DMA_UNMAP, unmap()) as ask:
        assert await ask.waits()
        with pytest.raises(DeviceError) as refused:
            memory.pin(IOVA + PAGE, 1, READ, "test")
        assert refused.value.errno == errno.EAGAIN
        memory.pin(0, 1, READ, "test").release()
        pin.release()
        await ask.reply()


async def test_a_release_by_another_thread_wakes_the_session(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    pin = served.function.dma.pin(IOVA, 1, READ, "test")
    async with asking(client, DMA_UNMAP, unmap()) as ask:
        assert await ask.waits()
        await trio.to_thread.run_sync(pin.release)
        assert not (await ask.reply()).flags & ERROR


async def test_what_the_client_says_meanwhile_is_answered_after_it_and_in_order(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    pin = served.function.dma.pin(IOVA, 1, READ, "test")
    await client.send(
        message(DMA_UNMAP, unmap(), message_id=1)
        + message(GET_INFO, INFO, message_id=2)
        + message(DMA_UNMAP, unmap(), message_id=3)
    )
    await trio.testing.wait_all_tasks_blocked()
    pin.release()
    replies = [await client.receive() for _ in range(3)]
    assert [(reply.message_id, reply.flags & ERROR) for reply in replies if reply] == [(1, 0), (2, 0), (3, 0)]


# --- nobody waits for ever


async def test_a_holder_that_does_not_let_go_is_named_and_the_window_stays(
    served: World,
    client: RawClient,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = served.function.dma
    pin = memory.pin(IOVA, 1, READ, "the copy engine")
    begun = trio.current_time()
    assert await client.refused(DMA_UNMAP, unmap()) == errno.EBUSY
    assert trio.current_time() - begun == pytest.approx(UNPIN_TIMEOUT)
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert told.getMessage() == (
        "card: DMA_UNMAP given up after 1 s: memory at 0x100000 to 0x10ffff is held by the copy engine"
    )
    memory.write(IOVA, b"usable")
    memory.pin(IOVA, 1, READ, "another").release()
    pin.release()
    await client.do(DMA_UNMAP, unmap())


def test_a_server_gives_up_before_its_client_does() -> None:
    assert UNPIN_TIMEOUT < UNMAP_TIMEOUT


async def test_a_client_that_leaves_is_not_waited_for_even_if_it_said_more(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    pin = served.function.dma.pin(IOVA, SIZE, READ | WRITE, "test")
    await client.send(message(DMA_UNMAP, unmap(), message_id=1) + message(GET_INFO, INFO, message_id=2))
    await trio.testing.wait_all_tasks_blocked()
    client.close()
    another = await served.client()
    assert served.card.resets == [ResetKind.LOST_CLIENT]
    assert pin.revoked
    pin.views[0][0] = 1
    await map_window(another)
    pin.release()
    assert balance(served.function) == 0
    await another.do(DMA_UNMAP, unmap())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_is_gone_does_not_wait_for_who_ignores_it(
    served: World, client: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    function = served.function
    pins = [function.dma.pin(IOVA, SIZE, WRITE, "a holder that does not look") for _ in range(3)]
    client.close()
    another = await mapped(served)
    assert function.dma.pins.counters == PinCounters(48, 0)
    assert "card: pages pinned: 48, released: 0" in caplog.messages
    assert all(pin.revoked for pin in pins)
    function.dma.pin(IOVA, 1, READ, "somebody else").release()
    await another.do(DMA_UNMAP, unmap())
    for pin in pins:
        pin.release()
    assert function.dma.pins.counters == PinCounters(49, 49)


async def test_other_cards_go_on_and_the_server_ends(tmp_path: Path) -> None:
    held, other = Card("held"), Card("other")
    cards = [(held.function, tmp_path / "held"), (other.function, tmp_path / "other")]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve, cards)
        clients = [await connect(path) for _, path in cards]
        for client in clients:
            (await client.negotiate()).close()
        await map_window(clients[0])
        held.function.dma.pin(IOVA, 1, READ, "for ever")
        await clients[0].send(message(DMA_UNMAP, unmap()))
        await trio.testing.wait_all_tasks_blocked()
        await clients[1].do(GET_INFO, INFO)
        nursery.cancel_scope.cancel()
    assert held.resets == [ResetKind.LOST_CLIENT]
    for client, card in zip(clients, (held, other), strict=True):
        client.close()
        card.function.close()


async def test_a_client_that_provokes_pins_without_end_finds_the_limit(
    served: World, client: RawClient, mock_clock: trio.testing.MockClock
) -> None:
    memory = served.function.dma
    pins = [memory.pin(IOVA, 1, READ, "test") for _ in range(MAX_PINS)]
    with pytest.raises(DeviceError) as refused:
        memory.pin(IOVA, 1, READ, "test")
    assert refused.value.errno == errno.ENOSPC
    async with asking(client, DMA_UNMAP, unmap()) as ask:
        assert await ask.waits()
        for pin in pins:
            pin.release()
        await ask.reply()
    assert memory.pins.counters == PinCounters(MAX_PINS, MAX_PINS)


# --- so does the end of running


@pytest.mark.parametrize(("before", "after"), [(None, STOP), (None, STOP_COPY), (PRE_COPY, STOP_COPY)])
async def test_a_card_stops_when_the_memory_is_released(
    served: World, client: RawClient, before: int | None, after: int, mock_clock: trio.testing.MockClock
) -> None:
    if before is not None:
        await client.do(FEATURE, state(before))
    pin = served.function.dma.pin(IOVA, 1, WRITE, "test")
    async with asking(client, FEATURE, state(after)) as ask:
        assert await ask.waits()
        assert served.function.running
        pin.release()
        await ask.reply()
    assert not served.function.running
    assert await current(client) == after


async def test_a_stop_that_is_given_up_lets_the_card_run_on(
    served: World, client: RawClient, autojump_clock: trio.testing.MockClock
) -> None:
    happened: list[str] = []
    served.function.on_stop = partial(happened.append, "stop")
    with served.function.dma.pin(IOVA, 1, READ, "test"):
        assert await client.refused(FEATURE, state(STOP)) == errno.EBUSY
        assert await current(client) == RUNNING
        assert (served.function.running, happened) == (True, [])
        served.function.dma.pin(IOVA, 1, READ, "test").release()
    await client.do(FEATURE, state(STOP))
    assert happened == ["stop"]


async def test_going_on_waits_for_nobody(served: World, client: RawClient) -> None:
    with served.function.dma.pin(IOVA, 1, READ, "test"):
        await client.do(FEATURE, state(PRE_COPY))
        await client.do(FEATURE, state(RUNNING))
        assert await client.refused(FEATURE, state(DeviceState.ERROR)) == errno.EINVAL
