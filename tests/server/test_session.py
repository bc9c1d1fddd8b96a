import errno
import os
import random
import resource
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from device.function import IrqIndex, ResetKind
from server import SessionLimits
from tests.descriptors import open_fds, settled_fds
from tests.server.raw import (
    CONFIG,
    DMA_MAP,
    ERROR,
    EVENTFD,
    GET_INFO,
    MSIX,
    NO_REPLY,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    SET_IRQS,
    TRIGGER,
    VERSION,
    Message,
    RawClient,
    access,
    dma,
    irqs,
    message,
    version,
)
from tests.server.world import BAR2_SIZE, PAGE, World, world

INFO = struct.pack("=IIII", 16, 0, 0, 0)


async def next_reply(client: RawClient) -> Message:
    reply = await client.receive()
    assert reply is not None
    return reply


# --- negotiation


async def test_a_version_is_agreed_on(served: World) -> None:
    client = await served.connect()
    reply = await client.negotiate()
    major, minor = reply.unpack("HH")
    assert (major, reply.command, reply.flags) == (0, VERSION, REPLY)
    assert minor <= 1
    assert reply.payload.endswith(b"}\0")


async def test_the_version_and_what_follows_may_come_in_one_piece(served: World) -> None:
    client = await served.connect()
    await client.send(version() + message(GET_INFO, INFO, message_id=7))
    assert (await next_reply(client)).command == VERSION
    assert (await next_reply(client)).message_id == 7


@pytest.mark.parametrize(
    "first",
    [
        message(GET_INFO, INFO),
        message(REGION_READ, access(0, 0, 4)),
        version(major=1),
        message(VERSION, b"\0"),
        message(VERSION, struct.pack("=HH", 0, 1) + b"{"),
    ],
)
async def test_a_client_that_does_not_come_to_terms_is_refused_and_let_go(
    served: World, first: bytes
) -> None:
    client = await served.connect()
    await client.send(first)
    refusal = await next_reply(client)
    assert (refusal.flags, refusal.error) == (REPLY | ERROR, errno.EINVAL)
    assert await client.hung_up()
    assert served.card.resets == []
    await served.client()


async def test_a_client_that_says_nothing_is_dropped(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, limits=SessionLimits(version_deadline=5)) as served:
        silent = await served.connect()
        start = trio.current_time()
        assert await silent.hung_up()
        assert trio.current_time() - start == 5
        await served.client()
    assert "it does not say VERSION" in caplog.text


async def test_half_a_version_is_none(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with world(tmp_path) as served:
        slow = await served.connect()
        await slow.send(version()[:20])
        assert await slow.hung_up()


async def test_a_client_that_came_to_terms_may_be_silent_for_as_long_as_it_likes(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with world(tmp_path) as served:
        client = await served.client()
        await trio.sleep(80_000)
        await client.do(GET_INFO, INFO)


# --- the stream


async def test_a_stream_cut_into_single_bytes_is_understood(client: RawClient) -> None:
    requests = message(REGION_READ, access(4, 0, 4), message_id=1) + message(GET_INFO, INFO, message_id=2)
    for byte in requests:
        await client.send(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked()
    assert (await next_reply(client)).payload[16:] == struct.pack("<I", 0x12345678 + 4)
    assert (await next_reply(client)).message_id == 2


async def test_a_stream_cut_anywhere_is_understood(client: RawClient) -> None:
    requests = b"".join(
        message(REGION_WRITE, access(8 * n, 2, 8) + bytes([n]) * 8, message_id=2 * n)
        + message(REGION_READ, access(8 * n, 2, 8), message_id=2 * n + 1)
        for n in range(40)
    )
    chance = random.Random(1)
    while requests:
        cut = chance.randrange(1, 100)
        await client.send(requests[:cut])
        await trio.testing.wait_all_tasks_blocked()
        requests = requests[cut:]
    for n in range(40):
        assert (await next_reply(client)).payload == access(8 * n, 2, 8)
        assert (await next_reply(client)).payload == access(8 * n, 2, 8) + bytes([n]) * 8


async def test_pipelined_requests_of_all_kinds_are_answered_in_order(client: RawClient) -> None:
    kinds = [
        (GET_INFO, INFO),
        (REGION_READ, access(0, 0, 4)),
        (REGION_WRITE, access(0, 0, 4) + bytes(4)),
        (REGION_READ, access(0, 2, 4096)),
        (REGION_READ, access(0, 9, 4)),
        (99, b""),
    ]
    order = random.Random(2).choices(kinds, k=300)
    await client.send(b"".join(message(*kind, message_id=n) for n, kind in enumerate(order)))
    for n, (command, _) in enumerate(order):
        reply = await next_reply(client)
        assert (reply.message_id, reply.command) == (n, command)


async def test_posted_writes_are_done_before_what_follows_and_not_answered(
    served: World, client: RawClient
) -> None:
    await client.send(
        b"".join(
            message(REGION_WRITE, access(4 * n, 2, 4) + struct.pack("=I", n), flags=NO_REPLY)
            for n in range(64)
        )
        + message(REGION_WRITE, access(0, 9, 4) + bytes(4), flags=NO_REPLY)
        + message(REGION_WRITE, access(1024, 2, 100) + bytes(100), flags=NO_REPLY)
        + message(GET_INFO, INFO, flags=NO_REPLY)
        + message(99, flags=NO_REPLY)
        + message(REGION_READ, access(4 * 63, 2, 4), message_id=9)
    )
    reply = await next_reply(client)
    assert (reply.message_id, reply.payload[16:]) == (9, struct.pack("=I", 63))


async def test_message_ids_are_the_clients_own(client: RawClient) -> None:
    await client.send(message(REGION_READ, access(0, 0, 4), message_id=0xFFFF) * 2)
    assert {(await next_reply(client)).message_id for _ in range(2)} == {0xFFFF}


async def test_a_transfer_of_the_largest_size_is_done(served: World, tmp_path: Path) -> None:
    client = await served.client()
    data = os.urandom(BAR2_SIZE)
    await client.write(2, 0, data)
    assert await client.read(2, 0, BAR2_SIZE) == data


@pytest.mark.parametrize(
    "nonsense",
    [
        message(GET_INFO, INFO, size=15),
        message(GET_INFO, INFO, size=1 << 31),
        message(REGION_READ, access(0, 0, 4), size=2),
        message(GET_INFO, INFO, flags=2),
    ],
)
async def test_a_stream_that_makes_no_sense_ends_the_session(
    served: World, client: RawClient, nonsense: bytes
) -> None:
    await client.send(message(REGION_READ, access(0, 0, 4)) + nonsense + b"what follows is not looked at")
    while (reply := await client.receive()) is not None:
        assert reply.command in (REGION_READ, GET_INFO)
    await served.client()
    assert served.card.resets == [ResetKind.LOST_CLIENT]


async def test_a_reply_that_nobody_asked_for_ends_the_session(client: RawClient) -> None:
    await client.send(message(REGION_READ, access(0, 0, 4), flags=REPLY))
    assert await client.hung_up()


async def test_a_mistake_in_the_cards_code_costs_one_request(
    served: World, client: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    served.card.registers.broken = True
    assert await client.refused(REGION_READ, access(0, 0, 4)) == errno.EIO
    assert await client.refused(REGION_WRITE, access(0, 0, 4) + bytes(4)) == errno.EIO
    assert await client.refused(REGION_READ, access(0, 0, 128)) == errno.EIO
    assert "a mistake in the card's code" in caplog.text
    served.card.registers.broken = False
    await client.read(0, 0, 4)


async def test_a_client_cannot_fill_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with world(tmp_path, limits=SessionLimits(tellings=3)) as served:
        served.card.registers.broken = True
        client = await served.client()
        caplog.clear()
        for _ in range(10):
            await client.refused(99)
            await client.refused(REGION_READ, access(0, 0, 4))
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 3 + 1
    assert warnings[-1].getMessage() == "card: no more of this client is told"


# --- descriptors


async def test_descriptors_that_nobody_wants_are_closed(served: World, client: RawClient) -> None:
    before = settled_fds()
    fd = os.eventfd(0)
    for command, payload in [
        (GET_INFO, INFO),
        (REGION_READ, access(0, 0, 4)),
        (REGION_WRITE, access(0, 0, 4) + bytes(4)),
        (99, b""),
        (DMA_MAP, dma(1, PAGE)),
        (SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 100, 1)),
    ]:
        await client.ask(command, payload, [fd])
    os.close(fd)
    assert open_fds() == before


async def test_more_descriptors_than_were_agreed_on_are_refused_and_closed(
    served: World, client: RawClient
) -> None:
    before = settled_fds()
    fd = os.eventfd(0)
    for count in (17, 64, 253):
        payload = irqs(EVENTFD | TRIGGER, MSIX, 0, count)
        assert await client.refused(SET_IRQS, payload, [fd] * count) == errno.EINVAL
    os.close(fd)
    assert open_fds() == before


async def test_descriptors_of_half_a_message_are_closed_when_the_client_leaves(served: World) -> None:
    client = await served.client()
    fd = os.memfd_create("guest")
    await client.send(message(DMA_MAP, dma(0, PAGE))[:20], [fd])
    os.close(fd)
    client.close()
    await served.client()  # and the fixture counts what is open at the end


async def test_descriptors_before_a_breach_are_closed(served: World) -> None:
    client = await served.client()
    fd = os.eventfd(0)
    await client.send(message(GET_INFO, INFO) + message(GET_INFO, INFO, size=1), [fd])
    await client.send(message(GET_INFO, INFO), [fd])
    os.close(fd)
    while await client.receive() is not None:
        pass


async def test_what_came_in_one_piece_with_a_breach_is_answered_before_the_end(
    served: World, client: RawClient
) -> None:
    sound = message(GET_INFO, INFO, message_id=1) + message(REGION_READ, access(0, 0, 4), message_id=2)
    await client.send(sound + message(0xFFFF, message_id=3) + message(GET_INFO, INFO, size=1, message_id=4))
    replies = [await next_reply(client) for _ in range(4)]
    assert [reply.message_id for reply in replies] == [1, 2, 3, 4]
    assert [reply.error for reply in replies] == [0, 0, errno.EINVAL, errno.EINVAL]
    assert await client.receive() is None


async def test_descriptors_belong_to_the_message_that_they_came_with(
    served: World, client: RawClient
) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, PAGE)
    await client.send(message(REGION_READ, access(0, 0, 4), message_id=1))
    await client.send(message(DMA_MAP, dma(0, PAGE), message_id=2), [fd])
    await client.send(message(REGION_READ, access(0, 0, 4), message_id=3))
    os.close(fd)
    assert [(await next_reply(client)).message_id for _ in range(3)] == [1, 2, 3]
    served.function.dma.write(0, b"x")


async def test_a_message_that_lost_descriptors_is_refused(served: World, client: RawClient) -> None:
    fd = os.memfd_create("guest")
    os.truncate(fd, PAGE)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(fd)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        await client.send(message(DMA_MAP, dma(0, PAGE)), [fd])
        refusal = await next_reply(client)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(fd)
    assert refusal.error == errno.EINVAL
    assert len(served.function.dma) == 0, "a window without its descriptor would be another window"
    await client.do(GET_INFO, INFO)


# --- leaving


async def test_a_client_that_leaves_takes_its_wiring_along(served: World) -> None:
    client = await served.client()
    fd = os.memfd_create("guest")
    os.truncate(fd, PAGE)
    await client.do(DMA_MAP, dma(0, PAGE), [fd])
    await client.do(SET_IRQS, irqs(EVENTFD | TRIGGER, MSIX, 0, 1), [eventfd := os.eventfd(0)])
    await client.write(CONFIG, 4, b"\x06\x00")
    os.close(fd)
    os.close(eventfd)
    client.close()
    other = await served.client()
    assert served.card.resets == [ResetKind.LOST_CLIENT]
    assert len(served.function.dma) == 0
    assert served.function.interrupts.active is None
    assert await other.read(CONFIG, 4, 2) == b"\0\0"


async def test_a_second_client_waits_for_its_turn(served: World) -> None:
    first = await served.client()
    second = await served.connect()
    await second.send(version())
    await trio.testing.wait_all_tasks_blocked()
    await first.do(GET_INFO, INFO)
    with pytest.raises(BlockingIOError), second.socket.dup()._sock as asked:  # type: ignore[attr-defined]
        asked.recv(1)
    first.close()
    assert (await next_reply(second)).command == VERSION


async def test_clients_may_come_and_go_at_any_point_of_a_message(served: World) -> None:
    stream = version() + message(GET_INFO, INFO) + message(REGION_READ, access(0, 0, 4))
    for end in range(0, len(stream), 3):
        client = await served.connect()
        await client.send(stream[:end])
        client.close()
    await served.client()
    assert set(served.card.resets) == {ResetKind.LOST_CLIENT}


async def test_a_client_that_stops_writing_but_reads_on_is_gone(served: World) -> None:
    client = await served.client()
    client.socket.shutdown(socket.SHUT_WR)
    assert await client.hung_up()


async def test_a_client_that_leaves_with_replies_unread_is_gone(served: World) -> None:
    client = await served.client()
    await client.send(message(REGION_READ, access(0, 2, BAR2_SIZE)) * 100)
    await trio.testing.wait_all_tasks_blocked()
    client.close()
    await served.client()
    assert served.card.resets == [ResetKind.LOST_CLIENT]


# --- clients that do not read


def flood(requests: int = 100) -> bytes:
    """Requests whose replies no socket buffer holds."""
    return message(REGION_READ, access(0, 2, BAR2_SIZE)) * requests


async def test_a_client_that_reads_late_gets_every_reply(served: World, client: RawClient) -> None:
    await client.send(flood() + message(GET_INFO, INFO, message_id=3))
    await trio.testing.wait_all_tasks_blocked()
    for _ in range(100):
        assert len((await next_reply(client)).payload) == 16 + BAR2_SIZE
    assert (await next_reply(client)).message_id == 3


async def test_small_replies_that_nobody_reads_are_all_sent_in_the_end(
    served: World, client: RawClient
) -> None:
    async with trio.open_nursery() as nursery:
        count = 20_000
        nursery.start_soon(client.send, message(REGION_READ, access(0, 0, 4)) * count)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(count):
            assert len((await next_reply(client)).payload) == 20


async def test_a_client_that_takes_no_replies_holds_only_itself(served: World, client: RawClient) -> None:
    with trio.move_on_after(1) as patience:
        await client.send(message(REGION_READ, access(0, 0, 4)) * 200_000)
    assert patience.cancelled_caught, "what is not answered is not read either"


async def test_a_client_that_takes_no_replies_is_dropped(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with world(tmp_path, limits=SessionLimits(send_deadline=7)) as served:
        client = await served.client()
        start = trio.current_time()
        await client.send(flood())
        await served.client()
        assert trio.current_time() - start == 7
    assert "it takes no messages" in caplog.text


async def test_a_client_that_takes_replies_slowly_is_kept(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with world(tmp_path, limits=SessionLimits(send_deadline=7)) as served:
        client = await served.client()
        await client.send(flood())
        for _ in range(100):
            await trio.sleep(5)
            await next_reply(client)
        await trio.sleep(100)
        await client.do(GET_INFO, INFO)


# --- polling


async def test_a_server_that_polls_serves_as_well(tmp_path: Path) -> None:
    async with world(tmp_path, poll_us=100) as served:
        client = await served.client()
        for offset in range(64):
            assert await client.read(0, offset, 1) == bytes([(0x78 + offset) & 0xFF])
        client.close()
        await served.client()
        assert served.card.resets == [ResetKind.LOST_CLIENT]


# --- turns


@pytest.mark.parametrize(
    "kind",
    [
        [message(REGION_READ, access(0, 0, 4))],
        [message(GET_INFO, INFO)],
        [message(GET_INFO, INFO), message(REGION_READ, access(0, 0, 4))],
    ],
)
async def test_a_busy_client_leaves_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, kind: list[bytes]
) -> None:
    async with world(tmp_path, limits=SessionLimits(messages_per_turn=4)) as served:
        turn = 0
        handled: Counter[int] = Counter()
        irq_indices = served.function.irqs()

        def counting_read(index: int, offset: int, count: int) -> bytes:
            handled[turn] += 1
            return bytes(count)

        def counting_irqs() -> Sequence[IrqIndex]:
            handled[turn] += 1
            return irq_indices

        async def take_turns() -> None:
            nonlocal turn
            while True:
                await trio.lowlevel.checkpoint()
                turn += 1

        monkeypatch.setattr(served.function, "region_read", counting_read)
        monkeypatch.setattr(served.function, "irqs", counting_irqs)
        client = await served.client()
        nursery.start_soon(take_turns)
        while not turn:
            await trio.lowlevel.checkpoint()
        await client.send(b"".join(kind * (200 // len(kind))))
        for _ in range(200):
            await next_reply(client)
        assert handled.total() == 200
        assert max(handled.values()) <= 2 * 4, "trio wakes what is ready in any order, so two turns may meet"
